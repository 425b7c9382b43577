"""Labels in the columns of tables."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from msf_faiss.errors import UserError

MOST_CLASSES = 1_000_000
"""A greater number is not a class but something else, such as an id."""


def convert_labels(column: pa.ChunkedArray, where: str, limit: int) -> NDArray[np.int64]:
    """[rows] labels of an integer column, -1 where it is null.

    Raises:
        UserError: if a label is neither -1 nor in 0..limit-1; `where` names the column.
    """
    # A copy, since Arrow's memory is read-only, about which torch warns.
    labels = np.array(column.cast(pa.int64(), safe=False).fill_null(-1).to_numpy(), np.int64)
    wrong = np.flatnonzero((labels >= limit) | (labels < -1))
    if len(wrong):
        raise UserError(
            f"{where} has label {labels[wrong[0]]} in row {wrong[0]}, but there are {limit} classes (counted from 0;"
            " -1: unlabelled); set data.label_column to another column, or to null to train without labels"
        )
    return labels
