"""Image files below a folder, with or without classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import features
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from msf_faiss.data.base import Reduce
from msf_faiss.data.images import decode_image, unreadable
from msf_faiss.errors import UserError

EXTENSIONS: tuple[str, ...] = (*IMG_EXTENSIONS, *([".avif"] if features.check("avif") else []))
"""Endings of image files, in lower case; files with another are not looked at."""


class FolderSource:
    """A `Source` over the image files below a folder, in the order of their paths.

    Symbolic links are followed, hidden files and folders are not looked into. With labels, the first level of
    subfolders names the classes, in alphabetical order; one without images is no class.
    """

    in_memory = False

    def __init__(
        self,
        path: Path,
        *,
        labels: Literal["auto", "folders", "none"] = "auto",
        classes: Sequence[str] | None = None,
        setting: str = "data.path",
    ) -> None:
        """`classes`: the names to number labels by, of another folder (None: this one's own).

        Raises:
            UserError: if the folder is missing or has no images, if with `labels="folders"` an image lies in no
                subfolder, or if a subfolder is not among `classes`.
        """
        if not path.is_dir():
            found = "is a file, not a folder" if path.exists() else "does not exist"
            raise UserError(f"{path} {found}; set {setting} to a folder of images")
        found_paths = list(_image_paths(path))
        if not found_paths:
            raise UserError(
                f"{path} holds no images; set {setting} to a folder with files ending in {', '.join(EXTENSIONS)}"
            )
        self._root = path
        # One block of bytes: a million str objects would be copied into every worker.
        encoded = [os.fsencode(relative) for relative in found_paths]
        self._paths = b"".join(encoded)
        self._ends = np.cumsum([len(one) for one in encoded])
        self.labels: NDArray[np.int64] | None = None
        self.classes: tuple[str, ...] | None = None
        depths = {relative.count(os.sep) for relative in found_paths}
        if labels == "folders" or (labels == "auto" and depths == {1}):
            self._label(found_paths, classes, setting)

    def _label(self, found_paths: list[str], classes: Sequence[str] | None, setting: str) -> None:
        loose = next((relative for relative in found_paths if os.sep not in relative), None)
        if loose is not None:
            raise UserError(
                f"{self._root / loose} lies in no class folder; move it into one, or set data.labels=none for images"
                " without classes"
            )
        folders = [relative.split(os.sep, 1)[0] for relative in found_paths]
        self.classes = tuple(sorted(set(folders)) if classes is None else classes)
        if unknown := sorted(set(folders) - set(self.classes)):
            raise UserError(
                f"{self._root} has class folders that the training images lack: {_some(unknown)}; known are"
                f" {_some(self.classes)}. Rename them, or set {setting} to a folder of the same classes"
            )
        index = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([index[folder] for folder in folders], np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, index: int) -> Path:
        """The image's file."""
        start = int(self._ends[index - 1]) if index else 0
        return self._root / os.fsdecode(self._paths[start : int(self._ends[index])])

    def name(self, index: int) -> str:
        return _printable(self.path(index))

    def decode(self, ids: Sequence[int], reduce: Reduce | None = None) -> list[Tensor]:
        return [self._decode(index, reduce and partial(reduce, index)) for index in ids]

    def _decode(self, index: int, reduce: Callable[[int, int], int] | None) -> Tensor:
        path = self.path(index)
        return decode_file(path, partial(_printable, path), reduce)


def decode_file(path: Path, name: Callable[[], str], reduce: Callable[[int, int], int] | None = None) -> Tensor:
    """The image in a file: uint8 RGB [3, H, W]. For `reduce` see `decode_image`.

    Raises:
        UnreadableImageError: naming `name()`, if there is no such file or it is no image.
    """
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise unreadable(name(), error.strerror or str(error)) from error
    return decode_image(encoded, name, reduce)


def _image_paths(root: Path) -> Iterator[str]:
    """Relative paths of the images below `root`, folder by folder in the order of their names.

    A link that leads nowhere counts as an image, an unreadable one.
    """

    def walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        status = Path(folder).stat()
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
            elif entry.name.lower().endswith(EXTENSIONS) and (entry.is_file() or entry.is_symlink()):
                yield prefix + entry.name

    return walk(str(root), "", frozenset())


def _printable(path: Path) -> str:
    """A path whose name need not be valid UTF-8, as text that any stream takes."""
    return str(path).encode(errors="backslashreplace").decode()


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first few of a list of names, for an error."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
