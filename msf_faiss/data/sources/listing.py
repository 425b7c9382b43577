"""The image files below a folder; the list of a large one is kept, since making it takes seconds a million files."""

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
"""Endings of image files, in lower case; files with another are not looked at."""

State = tuple[int, int, int]  # inode, times of modification and of change in ns; zeros for what is not there
_MISSING: State = (0, 0, 0)

_FORMAT = 1  # part of the key: raise it when a kept list means something else
_LEAST = 10_000  # images from which on a list is worth a file
_SETTLED = 3_000_000_000  # ns; the coarsest clock of a file system, FAT's, ticks every two seconds

_log = logging.getLogger(__name__)


class Names:
    """File names in one block of bytes: a million str objects would be copied into every worker."""

    def __init__(self, block: bytes, ends: NDArray[np.int64]) -> None:
        """`ends` [N]: where each name ends in `block`."""
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
        """[N] folders in each name."""
        separators = np.flatnonzero(np.frombuffer(self.block, np.uint8) == ord(os.sep))
        return np.diff(np.searchsorted(separators, self.ends), prepend=0)


def list_images(root: Path, cache: Path | None = None) -> Names:
    """Relative paths of the images below `root`, folder by folder in the order of their names.

    Symbolic links are followed, hidden files and folders are not looked into; a link that leads nowhere counts as an
    image, an unreadable one. A long list is kept in the folder `cache`, and believed as long as no folder in the tree
    has changed: that costs a look at each folder rather than at each file. A cache that is damaged or cannot be written
    costs time, nothing else.

    Raises:
        UserError: if a folder cannot be read.
    """
    if cache is None:
        return Names.pack(_walk(root, {}))
    file = cache / f"list-{digest(_FORMAT, root.resolve(), *EXTENSIONS)}.npz"
    known = _recall(file, root)
    if known is not None:
        return known
    started = time.time_ns()
    watched: dict[str, State] = {}
    names = Names.pack(_walk(root, watched))
    # What changes twice within a tick of the file system's clock looks as if it had changed once.
    settled = max(max(times) for _, *times in watched.values()) < started - _SETTLED
    if len(names) >= _LEAST and settled:
        _keep(file, root, names, watched)
    return names


def _walk(root: Path, watched: dict[str, State]) -> Iterator[str]:
    """The images; adds to `watched` whatever decides that they are these, by its path below `root`."""

    def walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        status = Path(folder).stat()
        watched[prefix] = _state(status)  # before it is read: a change meanwhile is one to come
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to a folder that we are in
            return
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error.strerror}; make it readable or move it away") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(entry.path, f"{prefix}{entry.name}{os.sep}", above | {here})
            elif entry.name.lower().endswith(EXTENSIONS):
                if entry.is_file() or entry.is_symlink():
                    yield prefix + entry.name
            elif entry.is_symlink():  # what it leads to may become a folder, unseen by the one that it is in
                watched[prefix + entry.name] = _state_of(Path(entry.path))

    return walk(str(root), "", frozenset())


def _state(status: os.stat_result) -> State:
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _state_of(path: Path) -> State:
    try:
        return _state(path.stat())
    except OSError:
        return _MISSING


def _keep(file: Path, root: Path, names: Names, watched: dict[str, State]) -> None:
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
        _log.info("the list of %s is not kept in %s: %s", root, file.parent, error.strerror or error)


def _recall(file: Path, root: Path) -> Names | None:
    """The list in `file` if there is one and it still holds."""
    try:
        # A zip file with a checksum for each array; numpy leaves a damaged one open, so it is opened here.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as kept:
            names = Names(kept["names"].tobytes(), kept["ends"])
            watched = Names(kept["watched"].tobytes(), kept["watched_ends"])
            states = kept["states"].tolist()
    except FileNotFoundError:
        return None
    except Exception as error:  # damage makes zipfile and numpy complain in many types
        _log.info("the list of %s in %s cannot be used: %s", root, file, error)
        return None
    holds = all(tuple(state) == _state_of(root / watched[index]) for index, state in enumerate(states))
    return names if holds else None
