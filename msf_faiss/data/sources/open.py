"""From the config of a data set to its source."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import torch

from msf_faiss.config import DataConfig, DemoData, FolderData, HuggingFaceData, ParquetData, WebDatasetData
from msf_faiss.data.source import Source
from msf_faiss.data.sources.disk_cache import cache_of
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.sources.huggingface import HuggingFaceSource
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.data.sources.parquet import ParquetSource
from msf_faiss.data.sources.torchvision import torchvision_source
from msf_faiss.data.sources.webdataset import WebDatasetSource

Shards = TypeVar("Shards", ParquetSource, WebDatasetSource)

_HELD_OUT = 10**9
"""First id of the demo's test images: beyond any training set that fits in memory."""


def open_source(config: DataConfig, split: Literal["train", "test"]) -> Source | None:
    """The training images, or the held-out ones: None if the config names none.

    The classes of both splits have the same numbers.

    Raises:
        UserError: if the data are missing, damaged or not of the kind that the config says.
    """
    match config:
        case DemoData():
            return _open_demo(config, split)
        case FolderData():
            return _open_folder(config, split)
        case ParquetData():
            return _open_parquet(config, split)
        case WebDatasetData():
            return _open_webdataset(config, split)
        case HuggingFaceData():
            return _open_huggingface(config, split)
        case _:
            return torchvision_source(config, split)


def _open_demo(config: DemoData, split: Literal["train", "test"]) -> MemorySource:
    from msf_faiss.data.sources.demo import CLASSES, render

    first, count = (0, config.images) if split == "train" else (_HELD_OUT, config.test_images)
    images, labels = render(np.arange(first, first + count), seed=config.seed, size=config.size)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return MemorySource(tensor, labels, CLASSES, title="demo" if split == "train" else "demo test")


def _open_folder(config: FolderData, split: Literal["train", "test"]) -> FolderSource | None:
    if split == "test" and config.test_path is None:
        return None
    cache = cache_of(config)
    train = FolderSource(config.path, labels=config.labels, cache=cache)
    if split == "train" or config.test_path is None:
        return train
    return FolderSource(
        config.test_path, labels=config.labels, classes=train.classes, setting="data.test_path", cache=cache
    )


def _open_parquet(config: ParquetData, split: Literal["train", "test"]) -> ParquetSource | None:
    return _open_shards(partial(ParquetSource, config), config, split)


def _open_webdataset(config: WebDatasetData, split: Literal["train", "test"]) -> WebDatasetSource | None:
    return _open_shards(partial(WebDatasetSource, config), config, split)


def _open_shards(
    opened: Callable[..., Shards], config: ParquetData | WebDatasetData, split: Literal["train", "test"]
) -> Shards | None:
    if split == "train":
        return opened(config.path)
    if config.test_path is None:
        return None
    return opened(config.test_path, classes=opened(config.path).classes, setting="data.test_path")


def _open_huggingface(config: HuggingFaceData, split: Literal["train", "test"]) -> HuggingFaceSource | None:
    if split == "train":
        return HuggingFaceSource(config, config.split)
    if config.test_split is None:
        return None
    classes = HuggingFaceSource(config, config.split).classes
    return HuggingFaceSource(config, config.test_split, classes=classes)
