"""Arrow files in `data.cache_dir`, derived from the files of a data set, that make it fast to open again."""

import errno
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa

from msf_faiss.config import CachedSource
from msf_faiss.errors import UserError

_FORMAT = 2  # part of the key; raise it when the contents of an Arrow file change

_log = logging.getLogger(__name__)


def cache_folder(config: CachedSource) -> Path:
    """The config's `cache_dir`, or `msf-faiss` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "msf-faiss"
    return default if config.cache_dir is None else config.cache_dir


def digest(*identity: object) -> str:
    """A short name for what has this identity."""
    text = "\0".join(map(str, identity))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:20]


def files_identity(files: Iterable[Path], *more: object) -> str:
    """SHA-256 of path, size and time of modification of `files`, in order, and of `more`."""
    total = hashlib.sha256(repr(more).encode(errors="surrogateescape"))
    for file in files:
        try:
            status = file.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # it will be an unreadable image
            state = "missing"
        total.update(os.fsencode(file.absolute()) + f"\0{state}\0".encode())
    return total.hexdigest()


def cached_arrow(
    shard: Path,
    variant: str,
    cache: Path,
    write: Callable[[Path], None],
    *,
    verb: str,
    size: Callable[[], int] = lambda: 0,
) -> Path:
    """Path of the Arrow file derived from `shard` in the folder `cache`; `write(path)` writes it if it does not exist.

    The shard's resolved path, size and time of modification and `variant` identify it. It is written to a temporary
    file and then renamed, so concurrent processes do no harm and a killed one leaves nothing that looks valid.
    `size()`: bytes needed, at least. `verb`: what is done to the shard, in messages.

    Raises:
        UserError: if the disk is full or the cache not writable; and whatever `write` raises.
    """
    status = shard.stat()
    key = digest(_FORMAT, os.path.realpath(shard), status.st_size, status.st_mtime_ns, variant)
    stem = re.sub(r"[^\w.=-]", "_", shard.stem, flags=re.ASCII)[:100]  # Arrow only opens names in UTF-8
    target = cache / f"{stem}-{key}.arrow"
    if _is_complete(target):
        return target
    needed = size()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(cache).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _log.info("%sing %s to %s", verb, shard, target)
        temporary = cache / f".{target.stem}-{uuid.uuid4().hex}.tmp"
        try:
            write(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot {verb} {shard} into {cache}: {error.strerror or error}; it needs {max(needed / 1e6, 1):.0f} MB:"
            " free some space, or set data.cache_dir to a folder on another disk"
        ) from error
    return target


def open_arrow(files: list[Path]) -> pa.Table:
    """The rows of all `files`, memory-mapped.

    Raises:
        UserError: if one is gone or damaged.
    """
    try:
        return pa.concat_tables([pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files])
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"the cached file cannot be read: {error}; start the command again, which rewrites it"
        ) from error


def _is_complete(file: Path) -> bool:
    """Whether the Arrow file exists and has its footer, which is written last."""
    try:
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped):
            return True
    except (pa.ArrowInvalid, OSError):
        return False
