"""List the image files below a folder, and cache the list of a large one: listing a million files takes seconds."""

from __future__ import annotations

import io
import logging
import os
import time
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import features
from torchvision.datasets.folder import IMG_EXTENSIONS

from msf_faiss.data.sources.disk_cache import digest
from msf_faiss.errors import UserError
from msf_faiss.files import write_atomic

EXTENSIONS: tuple[str, ...] = (*IMG_EXTENSIONS, *([".avif"] if features.check("avif") else []))
"""Lower-case extensions of image files; other files are ignored."""

State = tuple[int, int, int]  # inode, times of modification and of change in ns; zeros if the path does not exist
_MISSING: State = (0, 0, 0)

_FORMAT = 1  # part of the key; raise it when the contents of a cached list change
_FEWEST = 10_000  # images for which a list is cached
_SETTLED = 3_000_000_000  # ns since the last change; the coarsest clock of a file system, FAT's, ticks every 2 s

_log = logging.getLogger(__name__)


class Names:
    """File names in one block of bytes, which is cheap to copy into workers, unlike a million str objects."""

    def __init__(self, block: bytes, ends: NDArray[np.int64]) -> None:
        """`ends` [N]: end of each name in `block`."""
        self.block, self.ends = block, ends

    @classmethod
    def pack(cls, names: Iterable[str]) -> Names:
        block, ends = bytearray(), array("q")
        for name in names:
            block += os.fsencode(name)
            ends.append(len(block))
        return cls(bytes(block), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.block[start : int(self.ends[index])])

    def depths(self) -> NDArray[np.int64]:
        """[N] number of folders in each name."""
        separators = np.flatnonzero(np.frombuffer(self.block, np.uint8) == ord(os.sep))
        return np.diff(np.searchsorted(separators, self.ends), prepend=0)


def list_images(root: Path, cache: Path | None = None) -> Names:
    """Relative paths of the images below `root`, folder by folder in the order of their names.

    Symbolic links are followed, and hidden files and folders ignored; a broken link counts as an unreadable image. A
    long list is cached in the folder `cache` and used again while no folder of the tree has changed, which takes a stat
    of each folder instead of each file. A cache that is damaged or not writable costs time, nothing else.

    Raises:
        UserError: if a folder cannot be read.
    """
    if cache is None:
        return Names.pack(_walk(root, {}))
    file = cache / f"list-{digest(_FORMAT, root.resolve(), *EXTENSIONS)}.npz"
    cached = _load(file, root)
    if cached is not None:
        return cached
    started = time.time_ns()
    watched: dict[str, State] = {}
    names = Names.pack(_walk(root, watched))
    # Two changes within one tick of the file system's clock look like one.
    settled = max(max(times) for _, *times in watched.values()) < started - _SETTLED
    if len(names) >= _FEWEST and settled:
        _save(file, root, names, watched)
    return names


def _walk(root: Path, watched: dict[str, State]) -> Iterator[str]:
    """Yield the images; add to `watched` the state of everything that the list depends on, by its path below `root`."""

    def walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        status = Path(folder).stat()
        watched[prefix] = _state(status)  # before reading it, so that a change in between is noticed later
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to an enclosing folder
            return
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error.strerror}; make it readable, or move it away") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from walk(entry.path, f"{prefix}{entry.name}{os.sep}", above | {here})
            elif entry.name.lower().endswith(EXTENSIONS):
                if entry.is_symlink() or entry.is_file():
                    yield prefix + entry.name
            elif entry.is_symlink():  # its target may become a folder, without a change of this one
                watched[prefix + entry.name] = _state_of(Path(entry.path))

    return walk(str(root), "", frozenset())


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder without permission
        return False


def _state(status: os.stat_result) -> State:
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _state_of(path: Path) -> State:
    try:
        return _state(path.stat())
    except OSError:
        return _MISSING


def _save(file: Path, root: Path, names: Names, watched: dict[str, State]) -> None:
    paths = Names.pack(watched)
    content = io.BytesIO()
    np.savez(
        content,
        names=np.frombuffer(names.block, np.uint8),
        ends=names.ends,
        watched=np.frombuffer(paths.block, np.uint8),
        watched_ends=paths.ends,
        states=np.array(list(watched.values()), np.uint64),
    )
    try:
        write_atomic(file, content.getvalue(), sync=False)
    except OSError as error:
        _log.info("the list of %s cannot be cached in %s: %s", root, file.parent, error.strerror or error)


def _load(file: Path, root: Path) -> Names | None:
    """The cached list, if there is one and it is still valid."""
    try:
        # A zip file with a checksum per array. It is opened here because numpy does not close a damaged one.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            names = Names(arrays["names"].tobytes(), arrays["ends"])
            watched = Names(arrays["watched"].tobytes(), arrays["watched_ends"])
            states = arrays["states"].tolist()
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile and numpy raise many types for a damaged file
        _log.info("the cached list of %s in %s is damaged: %s", root, file, error)
        return None
    valid = all(tuple(state) == _state_of(root / watched[index]) for index, state in enumerate(states))
    return names if valid else None
