"""What is at a path, and atomic writes: a file appears complete, or not at all."""

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from msf_faiss.errors import UserError
from msf_faiss.text import printable


def kind_of(path: Path, remedy: str = "name another path") -> Literal["file", "folder", "special"] | None:
    """What is at `path`, after links: a special file is a named pipe, socket or device. None: nothing.

    Raises:
        UserError: if the file system does not say: a link to itself, a folder without permission, a name that is too
            long, a mount that is gone. It ends with `remedy`.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a zero byte
        return None
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be opened: {error.strerror}; {remedy}") from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special"


def list_names(folder: Path, remedy: str = "name another path") -> list[str]:
    """Names of what is in a folder, sorted, without hidden ones.

    Raises:
        UserError: if it cannot be read. It ends with `remedy`.
    """
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
    except OSError as error:
        raise UserError(f"{printable(folder)} cannot be read: {error.strerror}; {remedy}") from error


def write_atomic(path: Path, content: bytes | str, *, sync: bool = True) -> None:
    """Write `content` to a temporary file and rename it to `path`; missing folders are created. Text is UTF-8.

    Without `sync` the call does not wait for the disk: other processes still see either the old file or the new one,
    but a power failure may lose both.

    Raises:
        OSError: if the file cannot be written. An existing file stays intact, and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
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
    """Temporary names for the block to write to; if it succeeds, the files are synced and renamed to `paths`.

    The first path is renamed last; existing files are replaced, missing folders created. If the block fails, the
    temporary files are deleted.

    Raises:
        OSError: if a folder cannot be created, or a file was not written or cannot be renamed.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = [_temporary_name(path) for path in paths]
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


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")
