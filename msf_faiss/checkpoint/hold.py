"""Holds a checkpoint that is being read against the retention of the run, which may be training in another process.

Readers share a lock on the manifest; whoever deletes a checkpoint needs it alone. The system frees the lock of a
process that ends, however it ends. Where there are no such locks (Windows, some network file systems), nothing is held.
"""

import contextlib
import os
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DELETING = ".deleting-"


class Hold:
    """Holds the checkpoint of a manifest for as long as this object lives.

    Raises:
        OSError: if the manifest cannot be opened.
    """

    def __init__(self, manifest: Path) -> None:
        self._descriptor: int | None = None
        self._descriptor = os.open(manifest, os.O_RDONLY)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # this file system has no locks
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)  # waits while the checkpoint is being deleted

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()  # a copy, or another process, holds nothing

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def delete_unless_held(checkpoint: Path, manifest: Path) -> None:
    """Delete a checkpoint that nobody reads. Readers, and whoever comes after a kill, find all of it or nothing."""
    try:
        descriptor = os.open(manifest, os.O_RDWR)  # network file systems lock only what is open for writing
    except OSError:
        descriptor = None
    try:
        if descriptor is None or _lock_alone(descriptor):
            deleted = checkpoint.with_name(f"{DELETING}{checkpoint.name}")
            with contextlib.suppress(OSError):
                checkpoint.rename(deleted)
            shutil.rmtree(deleted, ignore_errors=True)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock_alone(descriptor: int) -> bool:
    """Lock a file without waiting; False if a reader holds it."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        pass
    return True
