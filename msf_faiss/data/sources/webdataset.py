"""Local tar files in the WebDataset convention, with random access."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.config import WebDatasetData
from msf_faiss.data.source import Reduce
from msf_faiss.data.sources.decode import decode_image, retry, unreadable
from msf_faiss.data.sources.disk_cache import cache_folder, files_identity, open_arrow
from msf_faiss.data.sources.labels import show_apart
from msf_faiss.data.sources.listing import readable_keys
from msf_faiss.data.sources.shards import find_shards
from msf_faiss.data.sources.tar_index import index_tar
from msf_faiss.errors import UserError
from msf_faiss.files import kind_of
from msf_faiss.text import printable

_MOST_OPEN = 256  # a process may usually have 1024 files open


class WebDatasetSource:
    """A `Source` of the samples in tar files (shards), in order.

    Opening it the first time indexes each shard (see `tar_index`). It is pickled without the index.
    """

    in_memory = False

    def __init__(
        self, config: WebDatasetData, path: Path, *, classes: Sequence[str] | None = None, setting: str = "data.path"
    ) -> None:
        """`classes`: names of the training images' classes; None: those of the config. `setting`: key of `path` in the
        config.

        Raises:
            UserError: if webdataset is not installed; if there is no shard, or one is compressed, damaged or not a tar
                file; if there are no images; if labels are out of range; if the cache is not writable.
        """
        files, notes = find_shards(path, ".tar", setting)
        self._shards = [_Shard(file) for file in files]
        self._files = [index_tar(shard.path, config, cache_folder(config)) for shard in self._shards]
        parts = [open_arrow([file]) for file in self._files]
        self._ends = np.cumsum([len(part) for part in parts])
        self._table: pa.Table | None = None
        self._max_pixels = config.max_pixels
        self.notes = notes + _describe_left_out(path, parts, config, setting)
        self.labels, self.classes = self._read_labels(config, path, classes)

    def _read_labels(
        self, config: WebDatasetData, path: Path, classes: Sequence[str] | None
    ) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
        labels = np.array(self._rows()["label"].to_numpy(), np.int64)  # a writable copy; torch warns about others
        if (labels == -1).all():
            if config.label_key in (None, WebDatasetData.model_fields["label_key"].default):
                return None, None
            raise UserError(
                f"no sample of {path} has a file with the extension .{config.label_key}; set data.label_key to another"
                " extension, or to null to train without labels"
            )
        names = _class_names(config.class_names) if classes is None else tuple(classes)
        if names is None:
            names = tuple(map(str, range(labels.max() + 1)))
        highest = int(labels.argmax())
        if labels[highest] >= len(names):
            setting = "class_names" if classes is None else "test_path"
            raise UserError(
                f"the label of {self.name(highest)} is {labels[highest]}, but there are {len(names)} classes (counted"
                f" from 0); correct data.{setting}, or set data.label_key to another extension, or to null"
            )
        return labels, names

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}

    def name(self, index: int) -> str:
        return printable(f"{self._shard(index).path}, {os.fsdecode(self._rows()['name'][index].as_py())}")

    def identity(self) -> str:
        return files_identity((shard.path for shard in self._shards), len(self))

    def relative_names(self) -> Iterator[str]:
        return map(os.fsdecode, self._rows()["name"].to_pylist())

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        rows = self._rows()
        offset, size = rows["offset"][index].as_py(), rows["size"][index].as_py()
        try:
            encoded = retry(partial(self._shard(index).read, offset, size))
        except OSError as error:
            raise unreadable(self.name(index), error.strerror or str(error)) from error
        return decode_image(encoded, partial(self.name, index), reduce, self._max_pixels)

    def _rows(self) -> pa.Table:
        if self._table is None:
            self._table = open_arrow(self._files)
        return self._table

    def _shard(self, index: int) -> _Shard:
        return self._shards[int(np.searchsorted(self._ends, index, side="right"))]


class _Shard:
    """A tar file that stays open once it is read from. Pickled without its descriptor."""

    _open = 0  # number of files that this process has open

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = _state(path.stat())
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on.

        Raises:
            OSError: if the file cannot be read.
            UserError: if the file has changed since it was indexed.
        """
        if self._descriptor is not None:
            try:
                return os.pread(self._descriptor, size, offset)
            except OSError:  # the next attempt opens the file again, which a stale descriptor of a network needs
                self._close()
                raise
        with self.path.open("rb", buffering=0) as file:
            if _state(os.fstat(file.fileno())) != self._state:
                raise UserError(f"{self.path} has changed since it was opened; start the command again")
            if _Shard._open < _MOST_OPEN and hasattr(os, "pread"):
                self._descriptor = os.dup(file.fileno())
                _Shard._open += 1
            file.seek(offset)
            return file.read(size)

    def __del__(self) -> None:
        if self.__dict__.get("_descriptor") is not None:  # unset if __init__ failed
            self._close()

    def _close(self) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None
        _Shard._open -= 1


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _class_names(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    if (
        kind_of(path, remedy := "set data.class_names to a text file with one class name per line, or to null")
        != "file"
    ):
        raise UserError(f"{printable(path)} cannot be read: it is no file; {remedy}")
    try:
        return show_apart([line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()])
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{printable(path)} cannot be read: {error}; {remedy}") from error


def _describe_left_out(path: Path, parts: Sequence[pa.Table], config: WebDatasetData, setting: str) -> list[str]:
    """The samples and files that are not used, and why.

    Raises:
        UserError: if no sample has an image.
    """
    facts = [{key.decode(): value.decode() for key, value in part.schema.metadata.items()} for part in parts]
    left_out, dotted, bare = (sum(int(each[key]) for each in facts) for key in ("left_out", "dotted", "bare"))
    extensions = sorted({extension for each in facts for extension in each["extensions"].split()})
    heif = {"heic", "heif", "hif"} & set(extensions) and "heic" not in readable_keys()
    what = []
    if left_out:
        plural = "" if left_out == 1 else "s"
        hint = "; to read HEIC, install pillow-heif" if heif else ""
        what.append(f"{left_out:,} sample{plural} without an image (with the extensions {', '.join(extensions)}{hint})")
    if dotted:
        example = next(each["example"] for each in facts if each["example"])
        _, _, extension = example.rpartition("/")[2].partition(".")
        what.append(
            f"{dotted:,} images with a dot within their names, such as {example}: WebDataset takes all that follows the"
            f" first dot as the extension, here {extension}; rename them, or list these extensions in data.image_keys"
        )
    if bare:
        what.append(f"{bare:,} file{'' if bare == 1 else 's'} without an extension")
    if not any(len(part) for part in parts):
        if not what:
            raise UserError(f"{printable(path)} contains no samples; set {setting} to tar files with images")
        raise UserError(
            f"no sample of {printable(path)} has a file with the extension {' or '.join(config.image_keys)} (left out:"
            f" {'; '.join(what)}); set data.image_keys to the extensions of its images"
        )
    return [f"{printable(path)}: left out {each}" for each in what]
