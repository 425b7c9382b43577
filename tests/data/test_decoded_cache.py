from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msf_faiss.config import Config
from msf_faiss.data import decoded_cache
from msf_faiss.data.decoded_cache import DecodedCache, cache_decoded, cache_size
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.data.train_batches import Batch, training_batches
from msf_faiss.data.workers import load
from msf_faiss.errors import UserError

PIXELS = sum(3 * (20 + index) * (40 - index) for index in range(20))
"""Bytes of the decoded photos."""


@pytest.fixture
def photos(tmp_path: Path) -> FolderSource:
    """Twenty JPEGs of different sizes in two classes."""
    generator = np.random.default_rng(0)
    for index in range(20):
        folder = tmp_path / "ab"[index % 2]
        folder.mkdir(exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (5, 7, 3), np.uint8))
        coarse.resize((20 + index, 40 - index)).save(folder / f"{index:02}.jpg")
    return FolderSource(tmp_path)


def config(size: int = 16, **data: Any) -> Config:
    return Config.model_validate(
        {
            "data": {"kind": "folder", "path": "unused", "workers": 0, "cache": "memory"} | data,
            "views": {"size": size},
            "train": {"batch_size": 5, "device": "cpu"},
        }
    )


def some_batches(source: Source, settings: Config) -> list[Batch]:
    return list(itertools.islice(training_batches(source, settings), 6))


def assert_same(first: Sequence[Batch], second: Sequence[Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.online.pixels, other.online.pixels)
        assert torch.equal(one.target.pixels, other.target.pixels)
        assert one.unreadable == other.unreadable


@pytest.mark.parametrize(
    ("size", "images", "workers"),
    [(16, 20, 0), (13, 11, 1)],  # at 13 px nine images may be reduced
)
def test_cached_images_give_the_same_views(photos: FolderSource, size: int, images: int, workers: int) -> None:
    cached = cache_decoded(photos, config(size))
    assert isinstance(cached, Source)
    assert (cached._shapes[:, 0] > 0).sum() == images
    assert_same(some_batches(cached, config(size, workers=workers)), some_batches(photos, config(size)))
    assert len(cached) == 20
    assert cached.name(3) == photos.name(3)
    assert cached.classes == ("a", "b")
    assert cached.labels is photos.labels


def inode_and_marked(cached: DecodedCache) -> tuple[int, bool]:
    """The inode of the pixels, and whether the first pixel is 77."""
    return os.fstat(cached._descriptor).st_ino, int(cached.decode(0)[0, 0, 0]) == 77


class Inspect:
    def __init__(self, cached: DecodedCache) -> None:
        self.cached = cached

    def __call__(self, _: int) -> tuple[int, bool]:
        return inode_and_marked(self.cached)


def test_workers_share_the_cached_pixels(photos: FolderSource) -> None:
    cached = cache_decoded(photos, config())
    results = load(Inspect(cached), itertools.count(), workers=1)
    before = [next(results) for _ in range(3)]
    cached.decode(0)[0, 0, 0] = 77
    assert {inode for inode, _ in before} == {inode_and_marked(cached)[0]}
    assert [next(results)[1] for _ in range(5)][-1]  # two results are prefetched
    results.close()


def test_unreadable_images_are_handled_as_without_a_cache(photos: FolderSource) -> None:
    photos.path(7).write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"14\.jpg.*data\.unreadable=skip"):
        cache_decoded(photos, config())
    skip = config(unreadable="skip")
    cached = cache_decoded(photos, skip)
    assert_same(some_batches(cached, skip), some_batches(photos, skip))
    with pytest.raises(UserError, match=r"more than data\.unreadable_limit"):
        cache_decoded(photos, config(unreadable="skip", unreadable_limit=0))


def test_cache_size_follows_the_config_and_the_free_memory(
    photos: FolderSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_size(photos, config()) == cache_decoded(photos, config()).bytes == PIXELS
    assert cache_size(photos, config(cache="none")) is None
    assert cache_size(MemorySource(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), title="blank"), config()) is None
    assert cache_size(photos, config(8)) == 0  # all images may be reduced
    assert cache_size(photos, config(8, cache="auto")) is None
    for free, processes, expected in [(8 * PIXELS, 1, PIXELS), (8 * PIXELS - 8, 1, None), (8 * PIXELS, 2, None)]:
        monkeypatch.setattr(decoded_cache, "_free_memory", lambda free=free: free)
        assert cache_size(photos, config(cache="auto"), processes=processes) == expected
    monkeypatch.setattr(decoded_cache, "_free_memory", lambda: None)
    assert cache_size(photos, config(cache="auto")) is None


def test_free_memory_is_plausible() -> None:
    free = decoded_cache._free_memory()
    assert free is None or free > 2**20
