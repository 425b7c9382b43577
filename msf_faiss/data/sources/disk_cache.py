"""What opening a data set found out, kept for the next time."""

from __future__ import annotations

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

_FORMAT = 1  # part of the key: raise it when the layout of an Arrow file changes

_log = logging.getLogger(__name__)


def default_cache() -> Path:
    """`msf-faiss` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "msf-faiss"


def cache_of(config: CachedSource) -> Path:
    """The folder that the config names, or the default."""
    return default_cache() if config.cache_dir is None else config.cache_dir


def digest(*identity: object) -> str:
    """A short name for something, different if any part of its identity is."""
    text = "\0".join(map(str, identity))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:20]


def identity_of(files: Iterable[Path], *more: object) -> str:
    """SHA-256 over path, size and time of modification of `files`, in their order, and over `more`."""
    found = hashlib.sha256(repr(more).encode(errors="surrogateescape"))
    for file in files:
        try:
            status = file.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # it will be an unreadable image
            state = "missing"
        found.update(os.fsencode(file.absolute()) + f"\0{state}\0".encode())
    return found.hexdigest()


def derive(
    shard: Path,
    variant: str,
    cache: Path,
    write: Callable[[Path], None],
    *,
    verb: str,
    size: Callable[[], int] = lambda: 0,
) -> Path:
    """The Arrow file that `write(path)` makes of `shard`; made if need be.

    It is found again by the shard's resolved path, size and time of modification, and by `variant`. It appears under
    its name only when it is complete, so that processes may race for it and a killed one leaves nothing that looks
    valid; one that lost its end is made anew.
    `verb` says for people what is done to the shard, `size` how many bytes that takes.

    Raises:
        UserError: if the disk is full or the cache not writable; and what `write` raises.
    """
    status = shard.stat()
    key = digest(_FORMAT, shard.resolve(), status.st_size, status.st_mtime_ns, variant)
    stem = re.sub(r"[^\w.=-]", "_", shard.stem, flags=re.ASCII)[:100]  # Arrow opens no name that is not UTF-8
    target = cache / f"{stem}-{key}.arrow"
    if _is_whole(target):
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
            " make room there, or set data.cache_dir to a folder on another disk"
        ) from error
    return target


def open_derived(files: list[Path]) -> pa.Table:
    """The rows of Arrow files one after the other, mapped rather than read."""
    return pa.concat_tables([pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files])


def _is_whole(file: Path) -> bool:
    """Whether there is such an Arrow file with its footer, which is written last."""
    try:
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped):
            return True
    except (pa.ArrowInvalid, OSError):
        return False
