"""Batches: the same for any number of workers and from any start, and unreadable images left out as configured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from msf_faiss.config import Config, WeakView
from msf_faiss.data.eval_batches import eval_batches
from msf_faiss.data.sampler import epoch_order
from msf_faiss.data.source import Reduce, Source, UnreadableImageError
from msf_faiss.data.sources.decode import unreadable
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.data.train_batches import Batch, Reduction, ViewMaker, steps_per_epoch, training_batches, worker_count
from msf_faiss.errors import UserError
from msf_faiss.views.random_view import ONLINE, TARGET, augment, augment_uint8_, center_crop, shrink


class FakeSource:
    """Images of many sizes made on demand, of which some cannot be read."""

    in_memory = False
    classes = ("even", "odd")

    def __init__(self, count: int, bad: Sequence[int] = (), *, labelled: bool = True) -> None:
        self._count, self._bad = count, frozenset(bad)
        self.labels = np.arange(count) % 2 if labelled else None

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"fake {index}"

    def identity(self) -> str:
        return "fake"

    def decode(self, ids: Sequence[int], reduce: Reduce | None = None) -> list[Tensor]:
        for index in ids:
            if index in self._bad:
                raise unreadable(self.name(index), "it is bad")
        sizes = [(20 + index % 7, 20 + index % 5) for index in ids]
        return [
            (torch.arange(3 * height * width) * (index + 1)).to(torch.uint8).view(3, height, width)
            for index, (height, width) in zip(ids, sizes, strict=True)
        ]


def config(batch_size: int = 8, **data: Any) -> Config:
    return Config.model_validate(
        {
            "seed": 5,
            "data": {"kind": "folder", "path": "unused", "workers": 0} | data,
            "views": {"size": 16},
            "train": {"batch_size": batch_size, "device": "cpu"},
        }
    )


def tensors(batch: Batch) -> list[Tensor]:
    parameters = [view.parameters for view in (batch.online, batch.target) if view.parameters]
    drawn = [tensor for each in parameters for tensor in each[:5]]
    return [batch.ids, batch.online.pixels, batch.target.pixels, *drawn]


def assert_same(first: Sequence[Batch], second: Sequence[Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.epoch == other.epoch
        assert one.unreadable == other.unreadable
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_a_batch() -> None:
    source = FakeSource(30)
    assert isinstance(source, Source)
    batch = next(training_batches(source, config()))
    assert batch.epoch == 0
    assert batch.ids.tolist() == epoch_order(30, 5, 0)[:8].tolist()
    assert batch.unreadable == {}
    online, target = batch.to(torch.device("cpu")).views(config().views)
    for view in (online, target):
        assert view.shape == (8, 3, 16, 16)
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert batch.online.parameters is batch.target.parameters is None  # nothing is left for the main process
    assert not torch.equal(online, target)


def test_a_gpu_gets_crops_and_what_to_do_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    source, views, either = FakeSource(30), config().views, config()
    either = either.model_copy(update={"train": either.train.model_copy(update={"device": "auto"})})
    on_cpu = ViewMaker(source, config(), {ONLINE: views.strong})(np.arange(30), 2)[1][ONLINE]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = ViewMaker(source, either, {ONLINE: views.strong})(np.arange(30), 2)[1][ONLINE]
    assert on_gpu.parameters is not None
    retouched = on_gpu.pixels.clone(memory_format=torch.channels_last)
    augment_uint8_(retouched, on_gpu.parameters)
    assert torch.equal(on_cpu.pixels, retouched)
    assert torch.equal(on_gpu.augment(views), augment(on_gpu.pixels, on_gpu.parameters, views))


def test_both_views_may_be_of_one_kind_and_are_independent() -> None:
    both_weak = config().model_copy(update={"views": config().views.model_copy(update={"online": "weak"})})
    batch = next(training_batches(FakeSource(30), both_weak))
    assert not torch.equal(batch.online.pixels, batch.target.pixels)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers: int) -> None:
    source = FakeSource(30, bad=[4])
    settings = {"unreadable": "skip"}
    alone = list(islice(training_batches(source, config(**settings)), 8))
    helped = training_batches(source, config(**settings, workers=workers))
    assert_same(alone, list(islice(helped, 8)))


def test_a_later_start_continues_the_same_batches() -> None:
    source = FakeSource(30)
    whole = list(islice(training_batches(source, config()), 9))
    assert steps_per_epoch(source, config()) == 3
    assert [batch.epoch for batch in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for start in (2, 3, 7):
        assert_same(whole[start:], list(islice(training_batches(source, config(), start_step=start), 9 - start)))


def test_an_image_is_seen_differently_each_epoch() -> None:
    batches = list(islice(training_batches(FakeSource(8), config()), 2))
    first, second = (batch.online.pixels[batch.ids.argsort()] for batch in batches)
    assert not torch.equal(first, second)


def test_too_few_images() -> None:
    with pytest.raises(UserError, match=r"7 training images do not fill a batch of 8"):
        next(training_batches(FakeSource(7), config()))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_the_run(workers: int) -> None:
    with pytest.raises(UnreadableImageError, match=r"^fake 3: cannot read this image: it is bad; .*unreadable=skip$"):
        list(islice(training_batches(FakeSource(8, bad=[3]), config(workers=workers)), 1))


def test_unreadable_images_are_left_out_up_to_a_limit() -> None:
    source = FakeSource(16, bad=[3, 11])
    settings = {"unreadable": "skip", "unreadable_limit": 2}
    batches = list(islice(training_batches(source, config(**settings)), 10))  # five epochs: the same two each time
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert sorted(first.unreadable | second.unreadable) == [3, 11]
        assert len(first.ids) + len(second.ids) == 14
        assert (
            len(first.ids)
            == 8 - len(first.unreadable)
            == len(first.online.pixels)
            == len(first.views(config().views)[1])
        )
    with pytest.raises(
        UserError,
        match=r"^2 images cannot be read, more than data\.unreadable_limit \(1\); .*limit:\n  fake \d+: .*\n  fake",
    ):
        list(islice(training_batches(source, config(unreadable="skip", unreadable_limit=1)), 10))


def test_a_batch_needs_two_images() -> None:
    source = FakeSource(3, bad=[0, 1])
    with pytest.raises(UserError, match=r"only 1 of a batch of 3 images can be read, too few.*\n  fake"):
        next(training_batches(source, config(batch_size=3, unreadable="skip")))


def test_workers_are_for_images_that_must_be_decoded() -> None:
    memory = MemorySource(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), title="blank")
    assert worker_count(memory, config(workers="auto")) == 0
    assert 1 <= worker_count(FakeSource(4), config(workers="auto")) <= 16
    assert worker_count(memory, config(workers=3)) == 3
    assert worker_count(FakeSource(4), config(workers="auto"), processes=1000) == 1


# -- large JPEGs


def photos(folder: Path, count: int, height: int, width: int) -> FolderSource:
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index:03}.jpg", quality=95)
    return FolderSource(folder)


class Undiminished(FolderSource):
    """Decodes in full size whatever is asked."""

    def decode(self, ids: Sequence[int], reduce: Reduce | None = None) -> list[Tensor]:
        return super().decode(ids)


def test_views_of_reduced_jpegs_show_the_same(tmp_path: Path) -> None:
    settings = config()
    settings = settings.model_copy(update={"views": settings.views.model_copy(update={"size": 48})})
    kinds, ids = {ONLINE: settings.views.weak, TARGET: settings.views.weak}, np.arange(40)
    source = photos(tmp_path, 40, 360, 480)
    reduced, whole = (ViewMaker(each, settings, kinds)(ids, 1)[1] for each in (source, Undiminished(tmp_path)))
    for stream in kinds:
        found, expected = reduced[stream].pixels.float(), whole[stream].pixels.float()
        # A corner is off by at most half a pixel of the smaller image, which is at most as much of the view. Where the
        # colours change by one's own size over 48 / 16 pixels of it, a neighbour one pixel off is another one.
        assert (found - expected).abs().mean() < 6
        shifted = expected.roll(4, dims=3)
        assert (found - shifted).abs().mean() > 3 * (found - expected).abs().mean()


def test_how_far_a_jpeg_may_be_reduced() -> None:
    boxes: list[list[int]] = []
    reduction = Reduction(lambda index, size: boxes, 100)
    assert reduction(0, 199, 5000) == 1  # nothing is drawn: no crop could be large enough
    for least, times in [(90, 1), (199, 1), (200, 2), (399, 2), (400, 4), (801, 8), (5000, 8)]:
        boxes[:] = [[0, 0, 900, 900], [7, 9, least, 1000]]
        assert reduction(least, 5000, 4000) == times
    assert reduction.reduced == {
        index: (5000, 4000, times) for index, times in [(200, 2), (399, 2), (400, 4), (801, 8), (5000, 8)]
    }


def test_boxes_in_a_smaller_image() -> None:
    boxes = torch.tensor([[10, 20, 300, 400], [3, 5, 7, 7], [0, 0, 203, 301]])
    times = torch.tensor([2, 1, 4])
    assert shrink(boxes, times).tolist() == [[5, 10, 150, 200], [3, 5, 7, 7], [0, 0, 51, 75]]


def test_reduced_images_are_the_same_in_any_batch(tmp_path: Path) -> None:
    source, settings = photos(tmp_path, 8, 100, 120), config()
    make = ViewMaker(source, settings, {ONLINE: settings.views.strong})
    together = make(np.arange(8), 3)[1][ONLINE].pixels
    for index in (0, 5):
        assert torch.equal(make(np.array([index]), 3)[1][ONLINE].pixels[0], together[index])


# -- evaluation


def test_eval_batches_are_centre_views_in_the_order_asked_for() -> None:
    source, ids = FakeSource(30), np.array([5, 29, 5, 0, 7])
    batches = list(eval_batches(source, ids, config=config(), batch_size=2))
    assert [batch.ids.tolist() for batch in batches] == [[5, 29], [5, 0], [7]]
    expected = center_crop(source.decode(ids.tolist()), config().views)
    assert torch.equal(torch.cat([batch.crops for batch in batches if isinstance(batch.crops, Tensor)]), expected)
    assert batches[0].views(torch.device("cpu"), config().views).dtype == torch.float32


def test_eval_batches_under_a_random_view() -> None:
    source, ids, cpu = FakeSource(30), np.arange(30), torch.device("cpu")

    def views(epoch: int, batch_size: int, workers: int = 0) -> Tensor:
        settings = config(workers=workers)
        batches = eval_batches(
            source, ids, config=settings, batch_size=batch_size, view=WeakView(crop_scale=(0.08, 1)), epoch=epoch
        )
        return torch.cat([batch.views(cpu, settings.views) for batch in batches])

    first = views(0, 7)
    assert first.shape == (30, 3, 16, 16)
    assert torch.equal(first, views(0, 30))
    assert torch.equal(first, views(0, 7, workers=2))
    assert not torch.equal(first, views(1, 7))


def test_eval_batches_leave_unreadable_images_out() -> None:
    source, skip = FakeSource(6, bad=[2, 3]), config(unreadable="skip")
    batches = list(eval_batches(source, np.arange(6), config=skip, batch_size=2))
    assert [batch.ids.tolist() for batch in batches] == [[0, 1], [4, 5]]  # a batch without images is left out
    with pytest.raises(UserError, match=r"none of the 2 images can be read, the first of them: fake 2"):
        list(eval_batches(source, np.array([2, 3]), config=skip, batch_size=2))
    with pytest.raises(UnreadableImageError, match="fake 2"):
        list(eval_batches(source, np.arange(6), config=config(), batch_size=2))
    limited = config(unreadable="skip", unreadable_limit=1)
    with pytest.raises(UserError, match=r"more than data\.unreadable_limit"):
        list(eval_batches(source, np.arange(6), config=limited, batch_size=2))


@pytest.mark.gpu
def test_batches_reach_a_gpu_without_waiting() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    on_gpu = config(workers=1)
    on_gpu = on_gpu.model_copy(update={"train": on_gpu.train.model_copy(update={"device": "cuda"})})
    batches = training_batches(FakeSource(30), on_gpu)
    expected = next(batches).views(on_gpu.views)  # by the GPU's way of finishing, on the CPU
    device = torch.device("cuda")
    next(batches).to(device).views(on_gpu.views)  # starts cuBLAS
    batch = next(training_batches(FakeSource(30), on_gpu))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = batch.to(device).views(on_gpu.views)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, expected, strict=True):
        # A pixel of the blur may round to the next of 2048 steps, and is divided by a deviation of .22.
        assert (one.cpu() - other).abs().max() < 0.01
