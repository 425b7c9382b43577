"""List the image files below a folder, and cache the list of a large one: listing a million files takes seconds."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import features

from msf_faiss.config import WebDatasetData
from msf_faiss.data.sources.decode import begins_like_image, reads_heif
from msf_faiss.data.sources.disk_cache import digest
from msf_faiss.errors import UserError
from msf_faiss.files import write_atomic
from msf_faiss.text import printable

NO_CONTENT = {
    *("@eaDir", "__MACOSX", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
    *("Thumbs.db", "desktop.ini"),
}
"""Names of what operating systems and file servers put beside the files of users."""

State = tuple[int, int, int]  # inode, times of modification and of change in ns; zeros if the path does not exist
_MISSING: State = (0, 0, 0)

_FORMAT = 2  # part of the key; raise it when the contents of a cached list change
_FEWEST = 10_000  # images for which a list is cached
_SETTLED = 3_000_000_000  # ns since the last change; the coarsest clock of a file system, FAT's, ticks every 2 s
_MOST_VISITS = 10_000  # paths to one folder; ten folders that link to each other have millions
_ENDING = re.compile(r"(\.(?=\d*[a-z])[a-z0-9]{1,10}|~)$")  # not a part of a name such as v1.0_0010
_HEIF = ("heic", "heif", "hif")
_SHOWN = 6  # kinds of files in a message

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


class Listing(NamedTuple):
    """The images below a folder, and the number of other files by lower-case ending ("" if they have none)."""

    names: Names
    left_out: Counter[str]


def readable_keys(keys: Iterable[str] = WebDatasetData.model_fields["image_keys"].default) -> list[str]:
    """Those extensions, without a dot, whose files Pillow can read here."""
    unreadable = [] if features.check("avif") else ["avif", "avifs"]
    if not reads_heif():
        unreadable += _HEIF
    return [key for key in keys if key not in unreadable]


def list_images(root: Path, cache: Path | None = None) -> Listing:
    """Relative paths of the images below `root`, folder by folder in the order of their names.

    An image has an ending of `readable_keys`, or none and the header of an image. Symbolic links are followed, and
    hidden files and folders and those of `NO_CONTENT` ignored; a broken link counts as an unreadable image. A long list
    is cached in the folder `cache` and used again while no folder of the tree has changed, which takes a stat of each
    folder instead of each file. A cache that is damaged or not writable costs time, nothing else.

    Raises:
        UserError: if a folder cannot be read.
    """
    endings = tuple(f".{key}" for key in readable_keys())
    left_out: Counter[str] = Counter()
    if cache is None:
        return Listing(Names.pack(_walk(root, endings, {}, left_out)), left_out)
    file = cache / f"list-{digest(_FORMAT, os.path.realpath(root), *endings)}.npz"
    cached = _load(file, root)
    if cached is not None:
        return cached
    started = time.time_ns()
    watched: dict[str, State] = {}
    names = Names.pack(_walk(root, endings, watched, left_out))
    # Two changes within one tick of the file system's clock look like one.
    settled = max(max(times) for _, *times in watched.values()) < started - _SETTLED
    if len(names) >= _FEWEST and settled:
        _save(file, root, Listing(names, left_out), watched)
    return Listing(names, left_out)


def is_listed(path: Path) -> bool:
    """Whether a path below a root is listed: no part of it is hidden or ignored."""
    return not any(part.startswith(".") or part in NO_CONTENT for part in path.parts)


def describe_left_out(left_out: Counter[str]) -> str:
    """Such as "7 .heic (to read them, install pillow-heif), 3 .txt, 1 without an ending"."""

    def describe(ending: str) -> str:
        heif = ending[1:] in _HEIF and not reads_heif()
        return (ending or "without an ending") + (" (to read them, install pillow-heif)" if heif else "")

    kinds = left_out.most_common()
    more = [f"{sum(count for _, count in kinds[_SHOWN:]):,} others"] if len(kinds) > _SHOWN else []
    return ", ".join([f"{count:,} {describe(ending)}" for ending, count in kinds[:_SHOWN]] + more)


def _walk(root: Path, endings: tuple[str, ...], watched: dict[str, State], left_out: Counter[str]) -> Iterator[str]:
    """Yield the images; add to `watched` the state of everything that the list depends on, by its path below `root`,
    and count other files in `left_out`, by ending."""
    visits: Counter[tuple[int, int]] = Counter()

    def enter(
        folder: str, prefix: str, above: frozenset[tuple[int, int]]
    ) -> tuple[Iterator[os.DirEntry[str]], str, frozenset[tuple[int, int]]]:
        try:
            status = Path(folder).stat()
            watched[prefix] = _state(status)  # before reading it, so that a change in between is noticed later
            here = (status.st_dev, status.st_ino)
            if here in above:  # a link to an enclosing folder
                return iter(()), prefix, above
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"{printable(folder)} cannot be read: {error.strerror}; make it readable, or move it away"
            ) from error
        visits[here] += 1
        if visits[here] > _MOST_VISITS:
            raise UserError(
                f"{printable(folder)} is one of more than {_MOST_VISITS:,} paths to the same folder; remove links"
                " between folders"
            )
        return iter(entries), prefix, above | {here}

    open_folders = [enter(str(root), "", frozenset())]  # a stack: trees may be deeper than Python's recursion
    while open_folders:
        entries, prefix, above = open_folders[-1]
        entry = next(entries, None)
        if entry is None:
            open_folders.pop()
        elif entry.name.startswith(".") or entry.name in NO_CONTENT:
            continue
        elif _is_folder(entry):
            open_folders.append(enter(entry.path, f"{prefix}{entry.name}{os.sep}", above))
        elif (kind := _left_out_as(entry, endings)) is None:
            yield prefix + entry.name
        else:
            left_out[kind] += 1
            if entry.is_symlink():  # its target may become a folder, without a change of this one
                watched[prefix + entry.name] = _state_of(Path(entry.path))


def _left_out_as(entry: os.DirEntry[str], endings: tuple[str, ...]) -> str | None:
    """The kind of a file that is no image."""
    name = entry.name.lower()
    if name.endswith(endings):
        return None if entry.is_symlink() or entry.is_file() else "special"  # pipes, sockets and devices
    if found := _ENDING.search(name):
        return found[0]
    return None if begins_like_image(Path(entry.path)) else ""


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


def _save(file: Path, root: Path, listing: Listing, watched: dict[str, State]) -> None:
    paths = Names.pack(watched)
    content = io.BytesIO()
    np.savez(
        content,
        names=np.frombuffer(listing.names.block, np.uint8),
        ends=listing.names.ends,
        watched=np.frombuffer(paths.block, np.uint8),
        watched_ends=paths.ends,
        states=np.array(list(watched.values()), np.uint64),
        left_out=np.frombuffer(json.dumps(listing.left_out).encode(), np.uint8),
    )
    try:
        write_atomic(file, content.getvalue(), sync=False)
    except OSError as error:
        _log.info("the list of %s cannot be cached in %s: %s", root, file.parent, error.strerror or error)


def _load(file: Path, root: Path) -> Listing | None:
    """The cached list, if there is one and it is still valid."""
    try:
        # A zip file with a checksum per array. It is opened here because numpy does not close a damaged one.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            names = Names(arrays["names"].tobytes(), arrays["ends"])
            watched = Names(arrays["watched"].tobytes(), arrays["watched_ends"])
            states = arrays["states"].tolist()
            left_out = Counter(json.loads(arrays["left_out"].tobytes()))
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile and numpy raise many types for a damaged file
        _log.info("the cached list of %s in %s is damaged: %s", root, file, error)
        return None
    valid = all(tuple(state) == _state_of(root / watched[index]) for index, state in enumerate(states))
    return Listing(names, left_out) if valid else None
