"""Unpack the image column of a Parquet file into an Arrow file that can be memory-mapped.

Parquet compresses whole row groups: reading one image means decompressing a group. From the Arrow file it means reading
a page or two; the file opens at once whatever its size, and all processes of a machine share its pages.
"""

import os
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from msf_faiss.data.sources.disk_cache import cached_arrow
from msf_faiss.errors import UserError

_ROWS = 256  # images per record batch; limits the memory needed to unpack


def unpack(shard: Path, column: str, cache: Path) -> Path:
    """Path of the Arrow file with the columns bytes (binary) and path (string) of `shard`, written first if necessary.

    Raises:
        UserError: if the disk is full, the cache not writable, or the shard damaged.
    """
    write = partial(_write, shard, column)
    return cached_arrow(shard, column, cache, write, verb="unpack", size=partial(_unpacked_size, shard, column))


def damaged(shard: Path, error: Exception) -> UserError:
    """The error for a file that is not a complete Parquet file."""
    return UserError(f"{shard} is not a complete Parquet file: {error}; download or write it again")


def _unpacked_size(shard: Path, column: str) -> int:
    """Bytes of the uncompressed image column, from the footer."""
    metadata = pq.read_metadata(shard)
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    chunks = (group.column(index) for group in groups for index in range(metadata.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.startswith(f"{column}."))


def _write(shard: Path, column: str, target: Path) -> None:
    try:
        _copy(shard, column, target)
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the disk
            raise
        raise damaged(shard, error) from error


def _copy(shard: Path, column: str, target: Path) -> None:
    schema = pa.schema({"bytes": pa.binary(), "path": pa.string()})
    # Neither the file nor a row group has to fit into memory.
    with pq.ParquetFile(shard, pre_buffer=False, buffer_size=1 << 20) as reader, target.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in reader.iter_batches(batch_size=_ROWS, columns=[column], use_threads=False):
                image = batch.column(0)
                fields = dict(zip((field.name for field in image.type), image.flatten(), strict=True))
                writer.write_batch(
                    pa.record_batch([fields[field.name].cast(field.type) for field in schema], schema=schema)
                )
        file.flush()
        os.fsync(file.fileno())
