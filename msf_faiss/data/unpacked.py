"""Random access to the images of a parquet file: its image column, unpacked once into a memory-mapped Arrow file.

Parquet compresses whole row groups, so that one image costs a group. The Arrow file costs a page or two, opens at once
whatever its size, and its pages are shared by all processes of a machine.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from msf_faiss.errors import UserError

_FORMAT = 1  # part of the key: raise it when the layout of the Arrow file changes
_ROWS = 256  # images a record batch; bounds the memory of unpacking

_log = logging.getLogger(__name__)


def default_cache() -> Path:
    """`msf-faiss` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "msf-faiss"


def unpack(shard: Path, column: str, cache: Path) -> Path:
    """The Arrow file with columns bytes (binary) and path (string), a row for each of `shard`; made if need be.

    It is found again by the shard's resolved path, size and time of modification. It appears under its name only when
    it is complete, so that processes may race for it and a killed one leaves nothing that looks valid.

    Raises:
        UserError: if the disk is full, the cache not writable, or the shard damaged.
    """
    status = shard.stat()
    identity = f"{_FORMAT}\0{shard.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{column}"
    digest = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:20]
    target = cache / f"{shard.stem}-{digest}.arrow"
    if target.exists():
        return target
    needed = _unpacked_size(shard, column)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(cache).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _log.info("unpacking %s (%.1f GB) to %s", shard, needed / 1e9, target)
        temporary = cache / f".{target.stem}-{uuid.uuid4().hex}.tmp"
        try:
            _write(shard, column, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except pa.ArrowInvalid as error:
        raise damaged(shard, error) from error
    except OSError as error:
        if error.errno is None:  # Arrow's own complaint about the contents
            raise damaged(shard, error) from error
        raise UserError(
            f"cannot unpack {shard} into {cache}: {error.strerror or error}; it needs {max(needed / 1e6, 1):.0f} MB:"
            " make room there, or set data.cache_dir to a folder on another disk"
        ) from error
    return target


def damaged(shard: Path, error: Exception) -> UserError:
    """The error for a file that is no (complete) parquet file."""
    return UserError(f"{shard} is not a complete parquet file: {error}; fetch or write it again")


def open_unpacked(files: list[Path]) -> pa.Table:
    """The rows of the Arrow files one after the other, mapped rather than read."""
    return pa.concat_tables([pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files])


def _unpacked_size(shard: Path, column: str) -> int:
    """Bytes of the encoded images in a shard, from its footer."""
    metadata = pq.read_metadata(shard)
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    chunks = (group.column(index) for group in groups for index in range(metadata.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.startswith(f"{column}."))


def _write(shard: Path, column: str, target: Path) -> None:
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
