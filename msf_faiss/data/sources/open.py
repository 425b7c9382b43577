"""Open the data set that a config names."""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from msf_faiss.config import DataConfig, DemoData, FolderData, HuggingFaceData, ParquetData, WebDatasetData
from msf_faiss.data.source import Source
from msf_faiss.data.sources.disk_cache import cache_folder
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.sources.huggingface import HuggingFaceSource
from msf_faiss.data.sources.listing import is_listed
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.data.sources.parquet import ParquetSource
from msf_faiss.data.sources.sample import warn_of_losses
from msf_faiss.data.sources.shards import Ending, find_shards
from msf_faiss.data.sources.torchvision import torchvision_source
from msf_faiss.data.sources.webdataset import WebDatasetSource
from msf_faiss.errors import UserError
from msf_faiss.text import printable

Split = Literal["train", "test"]
_PathData = FolderData | ParquetData | WebDatasetData

_log = logging.getLogger(__name__)

_FIRST_TEST_ID = 10**9  # of the demo's held-out images: beyond any training set that fits in memory


def open_source(config: DataConfig, split: Split) -> Source | None:
    """The training images ("train"), or the held-out ones ("test"), or None if the config names none.

    Both splits number their classes as the training images do. What their images lose in decoding is logged.

    Raises:
        UserError: if the data are missing, damaged, or not of the config's kind.
    """
    try:
        source = _open(config, split)
    except UserError as error:
        if any(isinstance(path, Path) and not path.is_absolute() and str(path) in str(error) for _, path in config):
            raise UserError(f"{error}. Relative paths are looked for in {printable(Path.cwd())}") from error
        raise
    if source is not None and not source.in_memory and len(source):
        warn_of_losses(source, "training images" if split == "train" else "held-out images")
    return source


def _open(config: DataConfig, split: Split) -> Source | None:
    match config:
        case DemoData():
            return _open_demo(config, split)
        case FolderData():
            return _open_path(
                partial(FolderSource, labels=config.labels, cache=cache_folder(config), max_pixels=config.max_pixels),
                config,
                split,
            )
        case ParquetData():
            return _open_path(partial(ParquetSource, config), config, split)
        case WebDatasetData():
            return _open_path(partial(WebDatasetSource, config), config, split)
        case HuggingFaceData():
            return _open_huggingface(config, split)
        case _:
            return torchvision_source(config, split)


def _open_demo(config: DemoData, split: Split) -> MemorySource:
    from msf_faiss.data.sources.demo import CLASSES, render

    first, count = (0, config.images) if split == "train" else (_FIRST_TEST_ID, config.test_images)
    images, labels = render(np.arange(first, first + count), seed=config.seed, size=config.size)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return MemorySource(tensor, labels, CLASSES, title="demo" if split == "train" else "demo test")


def _open_path(
    create: Callable[..., FolderSource | ParquetSource | WebDatasetSource], config: _PathData, split: Split
) -> Source | None:
    if split == "test" and config.test_path is None:
        return None
    _check_apart(config)
    source = create(config.path)
    if split == "test":
        source = create(config.test_path, classes=source.classes, setting="data.test_path")
    for note in source.notes:
        _log.warning("%s", note)
    return source


def names_held_out(config: _PathData) -> bool:
    """Whether the config names held-out images other than the training images.

    Both may be splits of one folder of shards.
    """
    if config.test_path is None or os.path.realpath(config.test_path) != os.path.realpath(config.path):
        return config.test_path is not None
    return (
        not isinstance(config, FolderData)
        and _find_inodes(config, "train").keys() != _find_inodes(config, "test").keys()
    )


def _find_inodes(config: ParquetData | WebDatasetData, split: Split) -> dict[tuple[int, int], Path]:
    """The shards of a split by device and inode, since one file may have several names."""
    ending: Ending = ".parquet" if isinstance(config, ParquetData) else ".tar"
    path, setting = (config.path, "data.path") if split == "train" else (config.test_path, "data.test_path")
    files = [] if path is None else find_shards(path, ending, setting).files
    return {(status.st_dev, status.st_ino): file for file in files for status in [file.stat()]}


def _check_apart(config: _PathData) -> None:
    """Refuse held-out images among the training images, unless they are the same: then none are held out.

    Raises:
        UserError: if there are.
    """
    if config.test_path is None:
        return
    train, test = (Path(os.path.realpath(path)) for path in (config.path, config.test_path))
    if isinstance(config, FolderData):
        inner, outer = (test, train) if test.is_relative_to(train) else (train, test)
        shared = train != test and inner.is_relative_to(outer) and is_listed(inner.relative_to(outer))
        what = f"{printable(inner)} is in {printable(outer)}"
    else:
        try:
            trained, held_out = _find_inodes(config, "train"), _find_inodes(config, "test")
        except (UserError, OSError):  # opening them says it, if they are needed
            return
        both = [file for inode, file in held_out.items() if inode in trained]
        shared = bool(both) and trained.keys() != held_out.keys()
        what = f"{printable(both[0])} belongs to both" if both else ""
    if shared:
        raise UserError(
            f"data.test_path ({printable(config.test_path)}) and data.path ({printable(config.path)}) have images in"
            f" common, so that held-out images would be trained on: {what}; set data.path to the training images alone"
        )


def _open_huggingface(config: HuggingFaceData, split: Split) -> HuggingFaceSource | None:
    if split == "train":
        return HuggingFaceSource(config, config.split)
    if config.test_split is None:
        return None
    classes = HuggingFaceSource(config, config.split).classes
    return HuggingFaceSource(config, config.test_split, classes=classes)
