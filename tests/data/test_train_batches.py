from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest
import torch
from fake_source import FakeSource, config

from msf_faiss.data.sampler import epoch_order
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.data.train_batches import Batch, training_batches
from msf_faiss.errors import UserError


def assert_same(first: Sequence[Batch], second: Sequence[Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert (one.epoch, one.unreadable) == (other.epoch, other.unreadable)
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.online.pixels, other.online.pixels)
        assert torch.equal(one.target.pixels, other.target.pixels)


def test_a_batch_has_two_normalized_views_of_each_image() -> None:
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
    assert not torch.equal(online, target)


def test_two_views_of_one_kind_are_independent() -> None:
    batch = next(training_batches(FakeSource(30), config(online="weak")))
    assert not torch.equal(batch.online.pixels, batch.target.pixels)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    source = FakeSource(30, bad=[4])
    without, helped = (training_batches(source, config(unreadable="skip", workers=each)) for each in (0, workers))
    assert_same(list(islice(without, 8)), list(islice(helped, 8)))


def test_a_later_start_continues_the_same_batches() -> None:
    source = FakeSource(30)
    whole = list(islice(training_batches(source, config()), 9))
    assert [batch.epoch for batch in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for start in (2, 3, 7):
        assert_same(whole[start:], list(islice(training_batches(source, config(), start_step=start), 9 - start)))


def test_views_of_an_image_differ_between_epochs() -> None:
    batches = list(islice(training_batches(FakeSource(8), config()), 2))
    first, second = (batch.online.pixels[batch.ids.argsort()] for batch in batches)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_the_batches(workers: int) -> None:
    with pytest.raises(UnreadableImageError, match=r"^fake 3: cannot read this image: it is bad; .*unreadable=skip$"):
        next(training_batches(FakeSource(8, bad=[3]), config(workers=workers)))


def test_unreadable_images_are_left_out_and_counted_once() -> None:
    source = FakeSource(16, bad=[3, 11])
    settings = config(unreadable="skip", unreadable_limit=2)
    batches = list(islice(training_batches(source, settings), 10))  # five epochs
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert sorted(first.unreadable | second.unreadable) == [3, 11]
        for batch in (first, second):
            left = 8 - len(batch.unreadable)
            assert left == len(batch.ids) == len(batch.online.pixels) == len(batch.views(settings.views)[1])
    with pytest.raises(UserError, match=r"^2 images are unreadable, more than data\.unreadable_limit \(1\)"):
        list(islice(training_batches(source, config(unreadable="skip", unreadable_limit=1)), 10))


def test_a_batch_with_a_single_readable_image_is_refused() -> None:
    source = FakeSource(3, bad=[0, 1])
    with pytest.raises(UserError, match=r"only 1 of the 3 images of a batch can be read, too few to train.*\n  fake"):
        next(training_batches(source, config(batch_size=3, unreadable="skip")))


@pytest.mark.gpu
def test_batches_reach_a_gpu_without_synchronization() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    settings, device = config(workers=1), torch.device("cuda")
    batches = training_batches(FakeSource(30), settings, device=device)
    expected = next(batches).views(settings.views)  # the float32 operations, on the CPU
    next(batches).to(device).views(settings.views)  # initializes cuBLAS
    batch = next(training_batches(FakeSource(30), settings, device=device))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = batch.to(device).views(settings.views)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, expected, strict=True):
        # A blurred pixel may round to the next of 2048 steps; normalizing divides by 0.22.
        assert (one.cpu() - other).abs().max() < 0.01
