"""Labels in the columns of tables, and names of classes."""

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from msf_faiss.errors import UserError

MOST_CLASSES = 1_000_000
"""A greater number is not a class but something else, such as an id."""

_REMEDY = "set data.label_column to another column, or to null to train without labels"


def is_label_type(kind: pa.DataType) -> bool:
    """Whether `convert_labels` takes a column: of text, integers, whole floats or booleans, or of nulls only."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    return is_text(kind) or any(test(kind) for test in numbers)


def text_classes(columns: Sequence[pa.ChunkedArray]) -> tuple[str, ...] | None:
    """The different texts in columns of text, sorted and shown apart; None for columns of another type."""
    plain = [_without_dictionary(column) for column in columns]
    if not is_text(plain[0].type):
        return None
    texts = {text for column in plain for text in pc.unique(column).to_pylist() if text is not None}
    return show_apart(sorted(texts))


def convert_labels(column: pa.ChunkedArray, where: str, names: Sequence[str] | None) -> NDArray[np.int64]:
    """[rows] labels of a column, -1 where it is null. Text is one of `names`; numbers count them from 0.

    Raises:
        UserError: if a label is neither -1 nor a class; `where` names the column.
    """
    column = _without_dictionary(column)
    if is_text(column.type):
        labels = _find_text(column, where, names or ())
    else:
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), None, column)
            wrong = np.flatnonzero((column.fill_null(0).to_numpy() % 1) != 0)
            if len(wrong):
                raise UserError(f"{where} has label {column[wrong[0]]} in row {wrong[0]}, which is no class; {_REMEDY}")
        # A copy, since Arrow's memory is read-only, about which torch warns.
        labels = np.array(column.cast(pa.int64(), safe=False).fill_null(-1).to_numpy(), np.int64)
    limit = MOST_CLASSES if names is None else len(names)
    wrong = np.flatnonzero((labels >= limit) | (labels < -1))
    if len(wrong):
        raise UserError(
            f"{where} has label {labels[wrong[0]]} in row {wrong[0]}, but there are {limit} classes (counted from 0;"
            f" -1: unlabelled); {_REMEDY}"
        )
    return labels


def show_apart(names: Sequence[str]) -> tuple[str, ...]:
    """`names`, with their code points where different ones look alike, as composed and decomposed accents do."""
    looks = Counter(map(_look, set(names)))
    return tuple(_with_code_points(name) if looks[_look(name)] > 1 else name for name in names)


def find_classes(names: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    """Number in `classes` of each name that is there: exactly, or as the only one that looks like it.

    macOS decomposes the accents in names of folders, so a copy of a data set may write them differently.
    """
    exact = {name: number for number, name in enumerate(classes)}
    looks = Counter(map(_look, classes))
    alike = {_look(name): number for number, name in enumerate(classes) if looks[_look(name)] == 1}
    found = {name: exact.get(name, exact.get(_with_code_points(name), alike.get(_look(name)))) for name in names}
    return {name: number for name, number in found.items() if number is not None}


def _find_text(column: pa.ChunkedArray, where: str, names: Sequence[str]) -> NDArray[np.int64]:
    texts = pc.unique(column).to_pylist()
    numbers = find_classes([text for text in texts if text is not None], names)
    unknown = [text for text in texts if text is not None and text not in numbers]
    if unknown:
        row = column.index(unknown[0]).as_py()
        raise UserError(
            f"{where} has label {unknown[0]!r} in row {row}, which is none of the {len(names)} classes; {_REMEDY}"
        )
    return np.array([-1 if text is None else numbers[text] for text in column.to_pylist()], np.int64)


def _without_dictionary(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def is_text(kind: pa.DataType) -> bool:
    """Whether a column is of strings, of any size of offsets."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _look(name: str) -> str:
    """What a name looks like: composed, without invisible characters and outer blanks."""
    visible = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
    return unicodedata.normalize("NFC", visible).strip()


def _with_code_points(name: str) -> str:
    return f"{name} ({name!a})"
