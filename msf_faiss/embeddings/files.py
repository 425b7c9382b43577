"""Files of embeddings, written batch by batch: a NumPy array, and a Parquet table of images.

Shapes: N images, B of a batch, F dimensions of an embedding.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from msf_faiss.data.source import Source
from msf_faiss.errors import UserError
from msf_faiss.files import kind_of
from msf_faiss.text import printable

Dtype = Literal["float32", "float16"]

METADATA_KEY = b"msf_faiss"
"""Key under which a table's schema describes the embeddings, as JSON."""

_ROW_GROUP_BYTES = 64 << 20  # of embeddings
_ROW_GROUP_ROWS = 1 << 16  # of a table without embeddings


def images_table(path: Path) -> Path:
    """Path of the table of names and labels that belongs to an array or an index at `path`."""
    return path.with_name(f"{path.name}.images.parquet")


def refuse_existing(files: Sequence[Path], *, force: bool) -> None:
    """Check, before hours of work, that `files` may be written.

    Raises:
        UserError: if one of them is a folder, or exists and `force` is not set.
    """
    for path in files:
        kind = kind_of(path, "name another file with --out")
        if kind == "folder":
            raise UserError(f"{printable(path)} is a folder; name a file with --out")
        if kind and not force:
            raise UserError(f"{printable(path)} already exists; name another file with --out, or replace it: --force")


@contextlib.contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names `out`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{printable(out)}: cannot write: {error.strerror or error}; free some space, or name another file with "
            "--out"
        ) from error


class ArrayFile:
    """A .npy file of rows [F], appended batch by batch. Complete once its context ends without an error.

    Plain writes rather than a memory map: on a full disk a map kills the process (SIGBUS), a write raises OSError.
    """

    def __init__(self, file: BinaryIO, dim: int, dtype: Dtype) -> None:
        self._file, self._dim, self._dtype, self._rows = file, dim, np.dtype(dtype), 0
        self._write_header()

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._file.seek(0)
            self._write_header()

    def write(self, rows: NDArray[Any]) -> None:
        """Append rows [B, F]."""
        self._file.write(rows.astype(self._dtype, copy=False).tobytes())
        self._rows += len(rows)

    def _write_header(self) -> None:
        # NumPy pads the header for a first axis of any length, so that the last one is as long as the first.
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._rows, self._dim),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


class TableFile:
    """A Parquet table of images, appended batch by batch: `id`, `name`, and `label` and `class` if images have labels.

    Complete once its context ends without an error.

    Args:
        file: to write to.
        source: the images' names and labels.
        metadata: describes the embeddings; stored with the schema under `METADATA_KEY`.
        embedding: dimensions and dtype of a column `embedding`; None: no such column.
        columns: types of further columns, by name.
    """

    def __init__(
        self,
        file: BinaryIO,
        source: Source,
        metadata: Mapping[str, Any],
        *,
        embedding: tuple[int, Dtype] | None = None,
        columns: Mapping[str, pa.DataType] = {},
    ) -> None:
        self._source = source
        self._classes = None if source.classes is None else [printable(name) for name in source.classes]
        fields = [pa.field("id", pa.int64(), nullable=False), pa.field("name", pa.string(), nullable=False)]
        if source.labels is not None:
            fields += [pa.field("label", pa.int64()), pa.field("class", pa.string())]
        fields += [pa.field(name, kind, nullable=False) for name, kind in columns.items()]
        self._group_rows = _ROW_GROUP_ROWS
        if embedding is not None:
            dim, dtype = embedding
            value = pa.field("element", pa.from_numpy_dtype(np.dtype(dtype)), nullable=False)
            fields.append(pa.field("embedding", pa.list_(value, dim), nullable=False))
            self._group_rows = max(1, _ROW_GROUP_BYTES // (dim * np.dtype(dtype).itemsize))
        self._schema = pa.schema(fields, {METADATA_KEY: json.dumps(metadata)})
        self._buffer: list[pa.RecordBatch] = []
        compressible = [field.name for field in fields if field.name != "embedding"]
        self._writer = pq.ParquetWriter(
            file, self._schema, compression=dict.fromkeys(compressible, "zstd"), use_dictionary=["class"]
        )

    def __enter__(self) -> TableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
            self._writer.close()
        else:
            with contextlib.suppress(OSError):
                self._writer.close()

    def write(self, ids: NDArray[np.int64], columns: Mapping[str, NDArray[Any]] = {}) -> None:
        """Append rows for the images `ids` [B], with `columns` [B, ...] that do not come from the source."""
        values: dict[str, Any] = {
            "id": pa.array(ids),
            "name": pa.array([printable(self._source.name(index)) for index in ids.tolist()], pa.string()),
        }
        if self._source.labels is not None:
            labels = self._source.labels[ids]
            values["label"] = pa.array(labels, mask=labels < 0)
            names = self._classes or []
            values["class"] = pa.array(
                [names[label] if 0 <= label < len(names) else None for label in labels.tolist()], pa.string()
            )
        for name, column in columns.items():
            kind = self._schema.field(name).type
            flat = pa.array(column.reshape(-1))
            nested = pa.types.is_fixed_size_list(kind)
            values[name] = pa.FixedSizeListArray.from_arrays(flat, type=kind) if nested else flat
        self._buffer.append(pa.record_batch([values[field.name] for field in self._schema], schema=self._schema))
        if sum(map(len, self._buffer)) >= self._group_rows:
            self._flush()

    def _flush(self) -> None:
        if self._buffer:
            rows = pa.Table.from_batches(self._buffer, self._schema)
            self._writer.write_table(rows, row_group_size=max(self._group_rows, len(rows)))
        self._buffer = []
