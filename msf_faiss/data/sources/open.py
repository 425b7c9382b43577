"""Open the data set that a config names."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch

from msf_faiss.config import DataConfig, DemoData, FolderData, HuggingFaceData, ParquetData, WebDatasetData
from msf_faiss.data.source import Source
from msf_faiss.data.sources.disk_cache import cache_folder
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.sources.huggingface import HuggingFaceSource
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.data.sources.parquet import ParquetSource
from msf_faiss.data.sources.sample import warn_of_losses
from msf_faiss.data.sources.torchvision import torchvision_source
from msf_faiss.data.sources.webdataset import WebDatasetSource

Split = Literal["train", "test"]

_FIRST_TEST_ID = 10**9  # of the demo's held-out images: beyond any training set that fits in memory


def open_source(config: DataConfig, split: Split) -> Source | None:
    """The training images ("train"), or the held-out ones ("test"), or None if the config names none.

    Both splits number their classes as the training images do. What their images lose in decoding is logged.

    Raises:
        UserError: if the data are missing, damaged, or not of the config's kind.
    """
    source = _open(config, split)
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
    create: Callable[..., Source], config: FolderData | ParquetData | WebDatasetData, split: Split
) -> Source | None:
    if split == "train":
        return create(config.path)
    if config.test_path is None:
        return None
    return create(config.test_path, classes=create(config.path).classes, setting="data.test_path")


def _open_huggingface(config: HuggingFaceData, split: Split) -> HuggingFaceSource | None:
    if split == "train":
        return HuggingFaceSource(config, config.split)
    if config.test_split is None:
        return None
    classes = HuggingFaceSource(config, config.split).classes
    return HuggingFaceSource(config, config.test_split, classes=classes)
