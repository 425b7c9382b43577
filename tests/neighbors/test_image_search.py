"""The search for images, compared with sorting all entries."""

import numpy as np
import pytest
import torch
from galleries import unit
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.bank import FlatBank, RingSpec
from msf_faiss.neighbors.image_search import ImageNeighbors, search_images


def brute_force(pushed: Tensor, ids: list[int], entries: int, query: Tensor, own: int, k: int) -> ImageNeighbors:
    """Sort the newest `entries`, and keep each image's first; [1, k]."""
    newest = range(max(0, len(ids) - entries), len(ids))
    similarities = {i: float(np.dot(pushed[i].double().numpy(), query.double().numpy())) for i in newest}
    best: dict[int, int] = {}
    for i in sorted(newest, key=lambda i: -similarities[i]):
        best.setdefault(ids[i], i)
    best.pop(own, None)
    result = ImageNeighbors.empty(1, k)
    for column, (index, i) in enumerate(list(best.items())[:k]):
        result.ids[0, column], result.similarities[0, column] = index, similarities[i]
        result.ages[0, column] = len(ids) - 1 - i
    return result


def assert_equal(neighbors: ImageNeighbors, row: int, expected: ImageNeighbors) -> None:
    one = neighbors.take(np.array([row]))
    assert (one.ids == expected.ids).all()
    assert (one.ages == expected.ages).all()
    # both computed in float64, ours rounded to float32 at the end
    np.testing.assert_allclose(one.similarities, expected.similarities, atol=1e-7)


@pytest.mark.parametrize("k", [1, 3, 7, 50])
@pytest.mark.parametrize(("images", "pushes", "capacity"), [(40, 30, 64), (40, 200, 64), (5, 90, 64), (1, 3, 8)])
def test_search_images_equals_brute_force(images: int, pushes: int, capacity: int, k: int) -> None:
    """A bank partly filled, wrapped around, with many entries per image, or with the query's own image only."""
    rng = np.random.default_rng(images * pushes)
    ids = rng.integers(images, size=pushes).tolist()
    pushed = unit(pushes, 8, seed=pushes)
    bank = FlatBank(RingSpec(capacity, 8))
    bank.push(pushed, torch.tensor(ids))
    queries = unit(6, 8, seed=1)
    own_ids = np.append(-1, rng.integers(images, size=5))
    neighbors = search_images(bank, queries, own_ids, k)
    for row, own in enumerate(own_ids.tolist()):
        assert_equal(neighbors, row, brute_force(pushed, ids, capacity, queries[row], own, k))


def test_bfloat16_bank_equals_its_entries_in_float32() -> None:
    queries, base, ids = unit(5, 16, seed=1), unit(50, 16, seed=0), torch.arange(50) % 20
    half, full = FlatBank(RingSpec(50, 16, torch.bfloat16)), FlatBank(RingSpec(50, 16))
    half.push(base, ids)
    full.push(base.bfloat16().float(), ids)
    own: NDArray[np.int64] = np.array([0, 1, 2, 3, -1])
    expected = search_images(full, queries.bfloat16().float(), own, 6)
    for one, other in zip(search_images(half, queries, own, 6), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("max_age", [None, 150])
def test_images_with_most_of_the_entries_hide_no_others(max_age: int | None) -> None:
    """Two of 40 images have 90 % of the entries, so that the entries fetched first have too few images."""
    rng = np.random.default_rng(0)
    ids = np.where(rng.random(300) < 0.9, rng.integers(2, size=300), rng.integers(40, size=300)).tolist()
    pushed = unit(300, 4, seed=0)
    bank = FlatBank(RingSpec(256, 4, max_age=max_age))
    bank.push(pushed, torch.tensor(ids))
    queries = unit(600, 4, seed=1)  # more than one batch
    own_ids = rng.integers(45, size=600)
    neighbors = search_images(bank, queries, own_ids, 12)
    entries = 256 if max_age is None else max_age + 1
    for row in range(0, 600, 7):
        assert_equal(neighbors, row, brute_force(pushed, ids, entries, queries[row], int(own_ids[row]), 12))
