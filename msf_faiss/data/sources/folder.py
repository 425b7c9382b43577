"""Image files below a folder, with or without classes."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.data.source import Reduce, ReduceOne
from msf_faiss.data.sources.decode import decode_image, unreadable
from msf_faiss.data.sources.disk_cache import identity_of
from msf_faiss.data.sources.listing import EXTENSIONS, list_images
from msf_faiss.errors import UserError
from msf_faiss.text import printable


class FolderSource:
    """A `Source` over the image files below a folder, as `listing.list_images` finds and orders them.

    With labels, the first level of subfolders names the classes, in alphabetical order; one without images is no class.
    """

    in_memory = False

    def __init__(
        self,
        path: Path,
        *,
        labels: Literal["auto", "folders", "none"] = "auto",
        classes: Sequence[str] | None = None,
        setting: str = "data.path",
        cache: Path | None = None,
    ) -> None:
        """`classes`: the names to number labels by, of another folder (None: this one's own).

        `cache`: the folder in which the list of a large folder is kept (None: nowhere).

        Raises:
            UserError: if the folder is missing or has no images, if with `labels="folders"` an image lies in no
                subfolder, or if a subfolder is not among `classes`.
        """
        if not path.is_dir():
            found = "is a file, not a folder" if path.exists() else "does not exist"
            raise UserError(f"{path} {found}; set {setting} to a folder of images")
        self._root = path
        self._names = list_images(path, cache)
        if not len(self):
            raise UserError(
                f"{path} holds no images; set {setting} to a folder with files ending in {', '.join(EXTENSIONS)}"
            )
        self.labels: NDArray[np.int64] | None = None
        self.classes: tuple[str, ...] | None = None
        depths = self._names.depths()
        if labels == "folders" or (labels == "auto" and (depths == 1).all()):
            if not depths.all():
                raise UserError(
                    f"{self.path(int(depths.argmin()))} lies in no class folder; move it into one, or set"
                    " data.labels=none for images without classes"
                )
            self._label(classes, setting)

    def _label(self, classes: Sequence[str] | None, setting: str) -> None:
        runs = dict(self._folders())
        folders = sorted(runs)
        self.classes = tuple(folders if classes is None else classes)
        if unknown := sorted(set(folders) - set(self.classes)):
            raise UserError(
                f"{self._root} has class folders that the training images lack: {_some(unknown)}; known are"
                f" {_some(self.classes)}. Rename them, or set {setting} to a folder of the same classes"
            )
        index = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.repeat(np.array([index[folder] for folder in runs], np.int64), list(runs.values()))

    def _folders(self) -> Iterator[tuple[str, int]]:
        """The folders of the first level, and how many images each holds: they follow one another in the list."""

        def folder_of(index: int) -> str:
            return self._names[index].partition(os.sep)[0]

        def end_of(folder: str, first: int) -> int:
            return bisect_left(range(len(self)), True, lo=first, key=lambda index: folder_of(index) != folder)

        first = 0
        while first < len(self):
            folder = folder_of(first)
            end = end_of(folder, first)
            yield folder, end - first
            first = end

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> Path:
        """The image's file."""
        return self._root / self._names[index]

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def identity(self) -> str:
        return identity_of(map(self.path, range(len(self))))

    def decode(self, ids: Sequence[int], reduce: Reduce | None = None) -> list[Tensor]:
        return [self._decode(index, reduce and partial(reduce, index)) for index in ids]

    def _decode(self, index: int, reduce: ReduceOne | None) -> Tensor:
        path = self.path(index)
        return decode_file(path, partial(printable, path), reduce)


def decode_file(path: Path, name: Callable[[], str], reduce: ReduceOne | None = None) -> Tensor:
    """The image in a file: uint8 RGB [3, H, W]. For `reduce` see `decode_image`.

    Raises:
        UnreadableImageError: naming `name()`, if there is no such file or it is no image.
    """
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise unreadable(name(), error.strerror or str(error)) from error
    return decode_image(encoded, name, reduce)


def decode_record(
    encoded: bytes | None, path: str | None, folder: Path, name: Callable[[], str], reduce: ReduceOne | None = None
) -> Tensor:
    """The image of a table's row in the Hugging Face convention: its bytes, or else the file at `path` in `folder`.

    For `reduce` see `decode_image`.

    Raises:
        UnreadableImageError: naming `name()`, if there is neither or it is no image.
    """
    if encoded is not None:
        return decode_image(encoded, name, reduce)
    if path is None:
        raise unreadable(name(), "it has neither bytes nor a path")
    return decode_file(folder / path, name, reduce)


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first few of a list of names, for an error."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
