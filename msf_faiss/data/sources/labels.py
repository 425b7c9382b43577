"""Numbers of classes as tables hold them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from msf_faiss.errors import UserError

MOST_CLASSES = 1_000_000
"""Beyond it a number is no class but something else, such as an id."""


def class_numbers(column: pa.ChunkedArray, where: str, limit: int) -> NDArray[np.int64]:
    """[rows] labels of an integer column, -1 where there is none.

    Raises:
        UserError: naming `where`, if one is neither -1 nor below `limit`.
    """
    # A copy, since Arrow's own memory cannot be written to, and torch warns of that.
    labels = np.array(column.cast(pa.int64(), safe=False).fill_null(-1).to_numpy(), np.int64)
    wrong = np.flatnonzero((labels >= limit) | (labels < -1))
    if len(wrong):
        raise UserError(
            f"{where} holds {labels[wrong[0]]} in row {wrong[0]}, which names none of {limit} classes (they count from"
            " 0; -1 is no label); set data.label_column to another column, or to null"
        )
    return labels
