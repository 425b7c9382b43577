from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from msf_faiss.data.sampler import BatchStream, epoch_order, steps_per_epoch
from msf_faiss.distributed.ranks import Ranks
from msf_faiss.errors import UserError


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_epoch_order_is_a_permutation(count: int) -> None:
    order = epoch_order(count, 0, 0)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))
    assert (order == epoch_order(count, 0, 0)).all()


def test_epoch_order_differs_between_seeds_and_epochs() -> None:
    orders = [epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    orders.append(np.arange(1000))
    for index, order in enumerate(orders):
        for other in orders[:index]:
            assert (order == other).sum() < 10  # 1 is expected by chance


def test_epoch_order_is_uniform() -> None:
    places = np.array([epoch_order(10, 0, epoch) for epoch in range(2000)])  # [epochs, 10]
    counts = np.array([[(places[:, place] == image).sum() for image in range(10)] for place in range(10)])
    assert abs(counts - 200).max() < 70  # 200 ± 13.4, five deviations


def test_stream_yields_the_whole_batches_of_each_epoch() -> None:
    stream = list(islice(BatchStream(10, 3, seed=4), 7))
    assert [(position.epoch, position.batch) for position in stream] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 0),
    ]
    for epoch in (0, 1):
        ids = np.concatenate([position.ids for position in stream if position.epoch == epoch])
        assert ids.tolist() == epoch_order(10, 4, epoch)[:9].tolist()  # the tenth image is left out


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 8])
def test_stream_can_start_at_any_step(start: int) -> None:
    whole = list(islice(BatchStream(10, 3, seed=4), 12))
    resumed = list(islice(BatchStream(10, 3, seed=4, start_step=start), 12 - start))
    for expected, found in zip(whole[start:], resumed, strict=True):
        assert found[:2] == expected[:2]
        assert found.ids.tolist() == expected.ids.tolist()


def test_steps_per_epoch() -> None:
    assert steps_per_epoch(8, 8) == 1
    assert steps_per_epoch(17, 8, ranks=4) == 2
    with pytest.raises(UserError, match=r"7 training images do not fill a batch of 8; set train\.batch_size to 7"):
        steps_per_epoch(7, 8)
    with pytest.raises(UserError, match=r"batch_size=8 is too small for 5 ranks: .*to 10 or more, or start fewer"):
        steps_per_epoch(100, 8, ranks=5)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_split_each_batch(ranks: int) -> None:
    whole = list(islice(BatchStream(30, 8, seed=4, start_step=2), 7))
    shares = [BatchStream(30, 8, seed=4, start_step=2, share=Ranks(rank, ranks).slice_of) for rank in range(ranks)]
    for expected, *parts in zip(whole, *[islice(share, 7) for share in shares], strict=True):
        assert all(part[:2] == expected[:2] for part in parts)
        assert np.concatenate([part.ids for part in parts]).tolist() == expected.ids.tolist()
