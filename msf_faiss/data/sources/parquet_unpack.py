"""Unpack the image column of a Parquet file into an Arrow file that can be memory-mapped.

Parquet compresses whole row groups: reading one image means decompressing a group. From the Arrow file it means reading
a page or two; the file opens at once whatever its size, and all processes of a machine share its pages.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from msf_faiss.data.sources.disk_cache import cached_arrow
from msf_faiss.data.sources.labels import is_text
from msf_faiss.errors import UserError

_Result = TypeVar("_Result")

_ROWS = 256  # images per record batch; limits the memory needed to unpack


def unpack(shard: Path, column: str, cache: Path) -> Path:
    """Path of the Arrow file with the columns bytes (binary) and path (string) of `shard`, written first if necessary.

    Raises:
        UserError: if the disk is full, the cache not writable, or the shard damaged.
    """
    write = partial(_write, shard, column)
    return cached_arrow(shard, column, cache, write, verb="unpack", size=partial(read, _unpacked_size, shard))


def is_image_type(kind: pa.DataType) -> bool:
    """Whether a column can contain images: encoded bytes, paths, or structs of `bytes` or `path` or both."""
    if pa.types.is_struct(kind):
        # Writers infer type null for what is missing in all rows.
        fields = {field.name: field.type for field in kind if not pa.types.is_null(field.type)}
        named = not fields.keys().isdisjoint({"bytes", "path"})
        return named and _is_binary(fields.get("bytes", pa.binary())) and is_text(fields.get("path", pa.string()))
    return _is_binary(kind) or is_text(kind)


def read(reader: Callable[[Path], _Result], shard: Path) -> _Result:
    """What `reader(shard)` returns.

    Raises:
        UserError: if the file cannot be opened, or is not a complete Parquet file.
    """
    try:
        return reader(shard)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        raise _damaged(shard, error) from error


def _damaged(shard: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{shard} cannot be read: {os.strerror(error.errno)}; make it readable, or name another file")
    return UserError(f"{shard} is not a complete Parquet file: {error}; download or write it again")


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _unpacked_size(shard: Path) -> int:
    """Bytes of the uncompressed columns, of which images are most, from the footer.

    Damaged facts about single columns would abort the process.
    """
    metadata = pq.read_metadata(shard)
    return sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))


def _write(shard: Path, column: str, target: Path) -> None:
    try:
        _copy(shard, column, target)
    except (pa.ArrowException, OSError, ValueError) as error:
        if getattr(error, "errno", None) is not None:  # of the disk
            raise
        raise _damaged(shard, error) from error


def _copy(shard: Path, column: str, target: Path) -> None:
    schema = pa.schema({"bytes": pa.binary(), "path": pa.string()})
    # Neither the file nor a row group has to fit into memory.
    with pq.ParquetFile(shard, pre_buffer=False, buffer_size=1 << 20) as reader, target.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            rows = 0
            for batch in reader.iter_batches(batch_size=_ROWS, columns=[column], use_threads=False):
                rows += len(batch)
                fields = _split(batch.column(0))
                missing = pa.nulls(len(batch))
                columns = [fields.get(field.name, missing).cast(field.type) for field in schema]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        if rows != reader.metadata.num_rows:
            raise pa.ArrowInvalid(f"{rows:,} rows instead of {reader.metadata.num_rows:,}")
        file.flush()
        os.fsync(file.fileno())


def _split(image: pa.Array) -> dict[str, pa.Array]:
    """The columns bytes and path of images, as far as they have them."""
    if pa.types.is_struct(image.type):
        return dict(zip((field.name for field in image.type), image.flatten(), strict=True))
    return {"bytes" if _is_binary(image.type) else "path": image}
