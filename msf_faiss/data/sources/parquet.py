"""Parquet files in the Hugging Face convention: a column `image{bytes, path}` and, optionally, an integer label."""

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.config import ParquetData
from msf_faiss.data.source import Reduce
from msf_faiss.data.sources.decode import decode_record
from msf_faiss.data.sources.disk_cache import cache_folder, files_identity, open_arrow
from msf_faiss.data.sources.labels import convert_labels, is_label_type, is_text, show_apart, text_classes
from msf_faiss.data.sources.parquet_unpack import is_image_type, read, unpack
from msf_faiss.data.sources.shards import find_shards
from msf_faiss.errors import UserError
from msf_faiss.text import printable


class ParquetSource:
    """A `Source` of the images in a file or in a folder of files (shards), which stay on disk.

    Opening it the first time unpacks each shard (see `parquet_unpack`). It is pickled without images.
    """

    in_memory = False

    def __init__(
        self, config: ParquetData, path: Path, *, classes: Sequence[str] | None = None, setting: str = "data.path"
    ) -> None:
        """`classes`: names of the training images' classes; None: those of this file. `setting`: key of `path` in the
        config.

        Raises:
            UserError: if there is no file, or one is damaged; if columns are missing, have other types than in the
                convention, or differ between shards; if labels are out of range; if the disk is full.
        """
        self._shards, self.notes = find_shards(path, ".parquet", setting)
        schemas = [read(pq.read_schema, shard) for shard in self._shards]
        for shard, schema in zip(self._shards, schemas, strict=True):
            _check_columns(shard, schema, config)
            _check_same(shard, schema, self._shards[0], schemas[0], config)
        counts = [read(pq.read_metadata, shard).num_rows for shard in self._shards]
        self._ends = np.cumsum(counts)
        self._column, self._max_pixels = config.image_column, config.max_pixels
        if not len(self):
            raise UserError(f"{path} contains no rows; set {setting} to a file with images")
        self.labels, self.classes = _read_labels(self._shards, schemas[0], config, classes)
        self._files = [unpack(shard, config.image_column, cache_folder(config)) for shard in self._shards]
        self._table: pa.Table | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}

    def name(self, index: int) -> str:
        shard, row = self._place(index)
        path = self._path(index)
        return printable(f"{shard}, row {row}" + (f" ({path})" if path else ""))

    def identity(self) -> str:
        return files_identity(self._shards, self._column)

    def relative_names(self) -> Iterator[str]:
        rows = self._rows()
        sizes = pc.binary_length(rows["bytes"])
        for path, size in zip(rows["path"].to_pylist(), sizes.to_pylist(), strict=True):
            yield path or f"an image of {size} bytes"

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        encoded, folder = self._rows()["bytes"][index].as_py(), self._place(index)[0].parent
        return decode_record(encoded, self._path(index), folder, partial(self.name, index), reduce, self._max_pixels)

    def _path(self, index: int) -> str | None:
        """Path in a row, which need not be UTF-8."""
        path = self._rows()["path"][index].as_buffer()
        return None if path is None else os.fsdecode(path.to_pybytes())

    def _rows(self) -> pa.Table:
        if self._table is None:
            self._table = open_arrow(self._files)
        return self._table

    def _place(self, index: int) -> tuple[Path, int]:
        """The shard of an image, and its row there, from 0."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[shard], index - (int(self._ends[shard - 1]) if shard else 0)


def _type_of(schema: pa.Schema, column: str | None) -> Any:
    return schema.field(column).type if column in schema.names else None


def _check_columns(shard: Path, schema: pa.Schema, config: ParquetData) -> None:
    image = _type_of(schema, config.image_column)
    if image is None or not is_image_type(image):
        problem = f"is {image}" if image is not None else f"is missing (columns: {', '.join(schema.names)})"
        images = [field.name for field in schema if is_image_type(field.type) and not is_text(field.type)]
        raise UserError(
            f"{shard}: column {config.image_column!r} must be struct<bytes: binary, path: string>, or contain bytes or"
            f" paths, but {problem}; set data.image_column to {' or '.join(images) or 'another column'}"
        )
    label = _type_of(schema, config.label_column)
    if label is None and config.label_column not in (None, ParquetData.model_fields["label_column"].default):
        raise UserError(
            f"{shard} has no column {config.label_column!r} (columns: {', '.join(schema.names)}); set"
            " data.label_column to one of them, or to null to train without labels"
        )
    if label is not None and not is_label_type(label):
        raise UserError(
            f"{shard}: column {config.label_column!r} must contain integers or text, but is {label}; set"
            " data.label_column to another column, or to null to train without labels"
        )


def _check_same(shard: Path, schema: pa.Schema, first: Path, expected: pa.Schema, config: ParquetData) -> None:
    columns = (config.image_column, config.label_column)
    compared = [(f"column {name!r}", _type_of(schema, name), _type_of(expected, name)) for name in columns]
    names = (_class_names(schema, config.label_column), _class_names(expected, config.label_column))
    for subject, here, there in [*compared, ("classes", *names)]:
        if here != there:
            raise UserError(
                f"{shard} does not match {first}: {subject}: {here or 'missing'} here, {there or 'missing'} there; keep"
                " only shards of one data set in the folder"
            )


def _class_names(schema: pa.Schema, label_column: str | None) -> tuple[str, ...] | None:
    """From the metadata of the schema: `huggingface` (info.features.<label>.names), or `class_names`, a JSON list."""
    metadata = schema.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]["names"]
    except (KeyError, ValueError, TypeError):
        try:
            names = json.loads(metadata[b"class_names"])
        except (KeyError, ValueError):
            return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return show_apart(names) if is_list else None


def _read_labels(
    shards: Sequence[Path], schema: pa.Schema, config: ParquetData, classes: Sequence[str] | None
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    column = config.label_column
    if column is None or _type_of(schema, column) is None:
        return None, None
    own = _class_names(schema, column)
    if own is not None and classes is not None and own != tuple(classes):
        raise UserError(
            f"the classes of {shards[0]} are {list(own)}, but the training images have {list(classes)}; set"
            " data.test_path to a file of the same data set"
        )
    columns = [read(partial(_read_column, column), shard) for shard in shards]
    names = own or classes or text_classes(columns)
    where = [f"{shard}: column {column!r}" for shard in shards]
    labels = np.concatenate([convert_labels(*each, names) for each in zip(columns, where, strict=True)])
    if (labels == -1).all():
        return None, None
    return labels, tuple(names or map(str, range(labels.max() + 1)))


def _read_column(column: str, shard: Path) -> pa.ChunkedArray:
    with pq.ParquetFile(shard) as file:
        read_column = file.read(columns=[column]).column(0)
    read_column.validate(full=True)  # that text is UTF-8
    return read_column
