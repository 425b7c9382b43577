"""Image files in a folder and its subfolders, with or without classes."""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.data.source import Reduce
from msf_faiss.data.sources.decode import MAX_PIXELS, decode_file
from msf_faiss.data.sources.disk_cache import files_identity
from msf_faiss.data.sources.labels import find_classes, show_apart
from msf_faiss.data.sources.listing import describe_left_out, list_images, readable_keys
from msf_faiss.data.sources.shards import SPLITS
from msf_faiss.errors import UserError
from msf_faiss.files import kind_of
from msf_faiss.text import printable


class FolderSource:
    """A `Source` of the image files below a folder, in the order of `listing.list_images`.

    Classes are the subfolders of the first level that have images, in alphabetical order.
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
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """`classes`: names of the training images' classes; None: those of this folder. `setting`: key of `path` in
        the config. `cache`: folder for the list of a large folder; None: do not cache it.
        `max_pixels`: see `decode_image`.

        Raises:
            UserError: if the folder is missing or has no images; with `labels="folders"`, if an image is in no
                subfolder; if a subfolder is not one of `classes`.
        """
        kind = kind_of(path, f"set {setting} to a folder of images")
        if kind != "folder":
            problem = "is a file, not a folder" if kind else "does not exist"
            raise UserError(f"{printable(path)} {problem}; set {setting} to a folder of images")
        self._root, self._max_pixels = path, max_pixels
        self._names, left_out = list_images(path, cache)
        if not len(self):
            found = f" (left out: {describe_left_out(left_out)})" if left_out else ""
            raise UserError(
                f"{printable(path)} contains no images{found}; set {setting} to a folder of files ending in"
                f" .{', .'.join(readable_keys())}"
            )
        self.notes: list[str] = []
        if left_out:
            self.notes.append(
                f"{printable(path)}: left out {left_out.total():,} files (no images, or of formats that are not read):"
                f" {describe_left_out(left_out)}"
            )
        self.labels: NDArray[np.int64] | None = None
        self.classes: tuple[str, ...] | None = None
        depths = self._names.depths()
        astray = np.flatnonzero(depths != 1)
        if labels == "auto" and 0 < len(astray) < len(self):
            remedy = "move or remove it" if not depths.all() else "move it, or set data.labels=folders"
            self.notes.append(
                f"{printable(path)}: the images have no labels, because {self.name(int(astray[0]))} is not exactly one"
                f" folder deep ({len(astray):,} of {len(self):,} images are not); {remedy}, or set data.labels=none if"
                " the folders are no classes"
            )
        words = [word for word in SPLITS if os.path.isdir(path / word)]  # noqa: PTH112  # which never raises
        if len({SPLITS[word] for word in words}) > 1:
            self.notes.append(
                f"{printable(path)}: uses the images of all splits, {' and '.join(words)}; to use one, set"
                f" {setting}={printable(path / words[0])}"
            )
        if labels == "folders" or (labels == "auto" and not len(astray)):
            if not depths.all():
                raise UserError(
                    f"{self.path(int(depths.argmin()))} is in no class folder; move it into one, or set"
                    " data.labels=none to ignore classes"
                )
            self._label(classes, setting)

    def _label(self, classes: Sequence[str] | None, setting: str) -> None:
        runs = dict(self._folders())
        folders = sorted(runs)
        self.classes = show_apart(folders) if classes is None else tuple(classes)
        index = find_classes(folders, self.classes)
        if unknown := [folder for folder in folders if folder not in index]:
            raise UserError(
                f"{self._root} has classes that the training images do not have: {_some(unknown)}; these have"
                f" {_some(self.classes)}; rename the folders, or set {setting} to a folder with the same classes"
            )
        self.labels = np.repeat(np.array([index[folder] for folder in runs], np.int64), list(runs.values()))

    def _folders(self) -> Iterator[tuple[str, int]]:
        """The folders of the first level and the number of images in each, which are consecutive in the list."""

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
        """File of an image."""
        return self._root / self._names[index]

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def identity(self) -> str:
        return files_identity(map(self.path, range(len(self))))

    def relative_names(self) -> Iterator[str]:
        return map(self._names.__getitem__, range(len(self)))

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        path = self.path(index)
        return decode_file(path, partial(printable, path), reduce, self._max_pixels)


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first few of a list of names."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
