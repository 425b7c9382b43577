"""Random access to the images of a parquet file: its image column, unpacked once into a memory-mapped Arrow file.

Parquet compresses whole row groups, so that one image costs a group. The Arrow file costs a page or two, opens at once
whatever its size, and its pages are shared by all processes of a machine.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from msf_faiss.data.sources.disk_cache import derive
from msf_faiss.errors import UserError

_ROWS = 256  # images a record batch; bounds the memory of unpacking


def unpack(shard: Path, column: str, cache: Path) -> Path:
    """The Arrow file with columns bytes (binary) and path (string), a row for each of `shard`; made if need be.

    Raises:
        UserError: if the disk is full, the cache not writable, or the shard damaged.
    """
    write = partial(_write, shard, column)
    return derive(shard, column, cache, write, verb="unpack", size=partial(_unpacked_size, shard, column))


def damaged(shard: Path, error: Exception) -> UserError:
    """The error for a file that is no (complete) parquet file."""
    return UserError(f"{shard} is not a complete parquet file: {error}; fetch or write it again")


def _unpacked_size(shard: Path, column: str) -> int:
    """Bytes of the encoded images in a shard, from its footer."""
    metadata = pq.read_metadata(shard)
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    chunks = (group.column(index) for group in groups for index in range(metadata.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.startswith(f"{column}."))


def _write(shard: Path, column: str, target: Path) -> None:
    try:
        _copy(shard, column, target)
    except pa.ArrowInvalid as error:
        raise damaged(shard, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise damaged(shard, error) from error  # Arrow's own complaint about the contents


def _copy(shard: Path, column: str, target: Path) -> None:
    schema = pa.schema({"bytes": pa.binary(), "path": pa.string()})
    # Neither the file nor one of its row groups need fit in memory.
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
