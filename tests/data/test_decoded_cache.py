"""Held images: the same views, in memory that workers share, by the same rules for unreadable ones."""

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
from msf_faiss.data import decoded_cache as held
from msf_faiss.data.decoded_cache import DecodedCache, cache_decoded, cache_size
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.data.train_batches import Batch, training_batches
from msf_faiss.data.workers import load
from msf_faiss.errors import UserError

PIXELS = sum(3 * (20 + index) * (40 - index) for index in range(20))
"""Bytes of the photos, decoded."""


@pytest.fixture
def photos(tmp_path: Path) -> FolderSource:
    """Twenty JPEGs of many sizes in two classes."""
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
    [(16, 20, 0), (13, 11, 1)],  # at 13 px nine may be decoded smaller
)
def test_views_are_the_same_bits(photos: FolderSource, size: int, images: int, workers: int) -> None:
    kept = cache_decoded(photos, config(size))
    assert isinstance(kept, Source)
    assert kept.images == images
    assert_same(some_batches(kept, config(size, workers=workers)), some_batches(photos, config(size)))
    assert len(kept) == 20
    assert kept.name(3) == photos.name(3)
    assert kept.classes == ("a", "b")
    assert kept.labels is photos.labels


def test_it_tells_what_it_holds(photos: FolderSource) -> None:
    kept = cache_decoded(photos, config())
    assert kept.bytes == cache_size(photos, config()) == PIXELS


def where_it_lies(kept: DecodedCache) -> tuple[int, bool]:
    """A file's inode, and whether a first pixel of 77 is seen."""
    return os.fstat(kept._descriptor).st_ino, int(kept.decode([0])[0][0, 0, 0]) == 77


class Look:
    def __init__(self, kept: DecodedCache) -> None:
        self.kept = kept

    def __call__(self, _: int) -> tuple[int, bool]:
        return where_it_lies(self.kept)


def test_workers_share_the_memory(photos: FolderSource) -> None:
    kept = cache_decoded(photos, config())
    results = load(Look(kept), itertools.count(), workers=1)
    before = [next(results) for _ in range(3)]
    kept.decode([0])[0][0, 0, 0] = 77
    assert {inode for inode, _ in before} == {where_it_lies(kept)[0]}
    assert [next(results)[1] for _ in range(5)][-1]  # two are made ahead
    results.close()


def test_unreadable_images_are_told_as_without_it(photos: FolderSource) -> None:
    photos.path(7).write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"14\.jpg.*data\.unreadable=skip"):
        cache_decoded(photos, config())
    skip = config(unreadable="skip")
    kept = cache_decoded(photos, skip)
    assert_same(some_batches(kept, skip), some_batches(photos, skip))
    with pytest.raises(UserError, match=r"more than data\.unreadable_limit"):
        cache_decoded(photos, config(unreadable="skip", unreadable_limit=0))


def test_what_is_not_held(photos: FolderSource, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_size(photos, config(cache="none")) is None
    memory = MemorySource(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), title="blank")
    assert cache_size(memory, config()) is None
    assert cache_size(photos, config(8)) == 0  # any of its images may be decoded smaller
    assert cache_size(photos, config(8, cache="auto")) is None
    for free, processes, expected in [(8 * PIXELS, 1, PIXELS), (8 * PIXELS - 8, 1, None), (8 * PIXELS, 2, None)]:
        monkeypatch.setattr(held, "_free_memory", lambda free=free: free)
        assert cache_size(photos, config(cache="auto"), processes=processes) == expected
    monkeypatch.setattr(held, "_free_memory", lambda: None)
    assert cache_size(photos, config(cache="auto")) is None


def test_free_memory_is_known_on_linux() -> None:
    free = held._free_memory()
    assert free is None or free > 2**20
