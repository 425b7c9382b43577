"""The search for neighbours, against a plain NumPy twin."""

import numpy as np
import pytest
import torch
from torch import Tensor

from msf_faiss.bank import FlatBank, RingSpec
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.neighbors.inspection import balanced_choice, retrieve
from msf_faiss.neighbors.retrieval import search_images


def unit(rows: int, dim: int, seed: int) -> Tensor:
    vectors = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def brute_force(pushed: Tensor, ids: list[int], capacity: int, query: Tensor, own: int, k: int):
    """(own best, others) as (id, similarity, age): sort everything, keep each image's first entry."""
    oldest = max(0, len(ids) - capacity)
    entries = [
        (ids[i], float(np.dot(pushed[i].double().numpy(), query.double().numpy())), len(ids) - 1 - i)
        for i in range(oldest, len(ids))
    ]
    entries.sort(key=lambda entry: -entry[1])
    best = {}
    for entry in entries:
        best.setdefault(entry[0], entry)
    own_entry = best.pop(own, None)
    return own_entry, list(best.values())[:k]


@pytest.mark.parametrize("k", [1, 3, 7, 50])
@pytest.mark.parametrize(("images", "pushes", "capacity"), [(40, 30, 64), (40, 200, 64), (5, 90, 64), (1, 3, 8)])
def test_retrieve_equals_brute_force(images: int, pushes: int, capacity: int, k: int) -> None:
    """Bank partly filled, wrapped around, with many entries an image, and with the query's own image alone."""
    rng = np.random.default_rng(images * pushes)
    ids = rng.integers(images, size=pushes).tolist()
    pushed = unit(pushes, 8, seed=pushes)
    bank = FlatBank(RingSpec(capacity, 8))
    bank.push(pushed, torch.tensor(ids))
    queries = unit(6, 8, seed=1)
    own_ids = [-1, *rng.integers(images, size=5).tolist()]
    for query, own_id, answer in zip(queries, own_ids, retrieve(bank, queries, own_ids, k), strict=True):
        own, others = brute_force(pushed, ids, capacity, query, own_id, k)
        assert [(found.id, found.age) for found in answer.others] == [(index, age) for index, _, age in others]
        # both computed in float64, ours rounded to float32 at the end
        assert [found.similarity for found in answer.others] == pytest.approx([one[1] for one in others], abs=1e-7)
        if own is None:
            assert answer.own is None
        else:
            assert answer.own is not None
            assert (answer.own.similarity, answer.own.age) == (pytest.approx(own[1], abs=1e-7), own[2])
            assert answer.own.entries == ids[-capacity:].count(own_id)


def test_the_own_entry_is_reported_when_it_is_the_least_similar() -> None:
    bank = FlatBank(RingSpec(32, 4))
    bank.push(torch.cat([-unit(1, 4, seed=0), unit(1, 4, seed=0).repeat(31, 1)]), torch.arange(32))
    (answer,) = retrieve(bank, unit(1, 4, seed=0), [0], k=2)
    assert answer.own is not None
    assert answer.own.similarity == pytest.approx(-1, abs=1e-6)
    assert answer.own.age == 31
    assert [found.id for found in answer.others] == [31, 30]  # equal ones: the youngest first


def test_a_bfloat16_bank_finds_the_same_as_its_own_entries_in_float32() -> None:
    queries, base, ids = unit(5, 16, seed=1), unit(50, 16, seed=0), torch.arange(50) % 20
    half, full = FlatBank(RingSpec(50, 16, torch.bfloat16)), FlatBank(RingSpec(50, 16))
    half.push(base, ids)
    full.push(base.bfloat16().float(), ids)
    own = [0, 1, 2, 3, -1]
    assert retrieve(half, queries, own, 6) == retrieve(full, queries.bfloat16().float(), own, 6)


def source(labels: list[int] | None) -> MemorySource:
    count = 100 if labels is None else len(labels)
    classes = None if labels is None else [f"class {label}" for label in range(max(labels, default=0) + 1)]
    return MemorySource(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), labels, classes, title="set")


def test_random_queries_are_balanced_and_follow_from_the_seed() -> None:
    labels = [0] * 90 + [1] * 7 + [2] * 3
    chosen = balanced_choice(source(labels), 12, seed=0)
    assert np.bincount([labels[index] for index in chosen]).tolist() in [[5, 4, 3], [4, 5, 3]]
    assert len(set(chosen)) == 12
    assert [labels[index] for index in chosen] == sorted(labels[index] for index in chosen)
    assert chosen == balanced_choice(source(labels), 12, seed=0)
    assert chosen != balanced_choice(source(labels), 12, seed=1)


def test_fewer_queries_than_classes_are_of_different_classes() -> None:
    labels = [index % 10 for index in range(100)]
    drawn = {tuple(labels[index] for index in balanced_choice(source(labels), 4, seed)) for seed in range(20)}
    assert all(len(set(classes)) == 4 for classes in drawn)
    assert len(drawn) > 5  # not always the first four


def test_random_queries_without_labels_and_of_few_images() -> None:
    assert len(set(balanced_choice(source(None), 7, seed=3))) == 7
    assert balanced_choice(source(None), 1000, seed=3) == list(range(100))
    assert balanced_choice(source([-1, 0, -1, 0]), 10, seed=0) == [1, 3]
    assert balanced_choice(source([0]), 3, seed=0) == [0]


@pytest.mark.parametrize("max_age", [None, 150])
def test_images_that_own_most_of_a_bank_hide_no_other(max_age: int | None) -> None:
    """Two of 40 images have nine in ten entries, so that at first too few images are among those fetched."""
    rng = np.random.default_rng(0)
    ids = np.where(rng.random(300) < 0.9, rng.integers(2, size=300), rng.integers(40, size=300)).tolist()
    pushed = unit(300, 4, seed=0)
    bank = FlatBank(RingSpec(256, 4, max_age=max_age))
    bank.push(pushed, torch.tensor(ids))
    queries = unit(600, 4, seed=1)  # more than are searched at a time
    own_ids = rng.integers(45, size=600)
    found = search_images(bank, queries, own_ids, 12)
    lives = 256 if max_age is None else max_age + 1
    for row in range(0, 600, 7):
        _, others = brute_force(pushed, ids, lives, queries[row], int(own_ids[row]), 12)
        padding = 12 - len(others)
        assert found.ids[row].tolist() == [index for index, _, _ in others] + [-1] * padding
        assert found.ages[row].tolist() == [age for _, _, age in others] + [-1] * padding
        # both computed in float64, ours rounded to float32 at the end
        assert found.similarities[row] == pytest.approx([one[1] for one in others] + [0] * padding, abs=1e-7)
