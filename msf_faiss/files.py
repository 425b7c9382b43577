"""Writing files so that they appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def write_atomic(path: Path, content: bytes | str, *, sync: bool = True) -> None:
    """Write beside `path`, sync, rename; missing folders are made, an older file gives way. Text is UTF-8.

    Without `sync` the disk is not waited for: readers still see the old file or the new one, but a machine that fails
    may lose both.

    Raises:
        OSError: if the file cannot be written; an older one is then intact, and nothing half-written stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_paths(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Temporary names beside `paths`, for the block to write files to; missing folders are made. If it ends well, each
    is synced and takes its own name, the first one last, and older files give way; if not, nothing is left of them.

    Raises:
        OSError: if a folder cannot be made, or a file was not written or cannot be renamed.
    """
    temporary = []
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.append(path.with_name(f".{path.name}.{uuid.uuid4().hex}"))
    try:
        yield tuple(temporary)
        for name, path in reversed(list(zip(temporary, paths, strict=True))):
            with name.open("rb") as file:
                os.fsync(file.fileno())
            name.replace(path)
    finally:
        for name in temporary:
            with contextlib.suppress(OSError):
                name.unlink()
