"""Statistics, compared with simple loops."""

import dataclasses
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from galleries import make_gallery, unit

from msf_faiss.errors import UserError
from msf_faiss.neighbors.gallery import Gallery
from msf_faiss.neighbors.image_cache import ImageCache
from msf_faiss.neighbors.image_search import search_images
from msf_faiss.neighbors.statistics import compute_statistics, purity_interval, worst_first


def search_random(gallery: Gallery, images: list[int], k: int) -> tuple[np.ndarray, ImageCache]:
    """Search the neighbours of images with random embeddings."""
    cache = ImageCache(gallery, k)
    ids = np.array(images)
    gallery.embed_views = lambda views: unit(len(views), 8, seed=1)
    gallery.views = lambda some: [(some, torch.zeros(len(some), 3, 8, 8, dtype=torch.uint8))]
    cache.neighbors(ids)
    return ids, cache


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


@pytest.mark.parametrize("k", [1, 4, 40])
@pytest.mark.parametrize("labelled", ["all", "some", "none"])
@pytest.mark.parametrize("searched", ["bank", "dataset"])
def test_statistics_equal_counting(k: int, labelled: str, searched: str) -> None:
    rng = np.random.default_rng(k)
    labels = None if labelled == "none" else rng.integers(0 if labelled == "all" else -1, 3, size=30).tolist()
    ids = list(range(30)) if searched == "dataset" else rng.integers(25, size=60).tolist()
    gallery = make_gallery(30, ids, labels=labels, searched=searched)
    if searched == "dataset":
        cache = ImageCache(gallery, k)
        sample = cache.sample(5, seed=0)
        assert sample.tolist() == list(range(30))
        embeddings = gallery.bank.reconstruct(torch.arange(30))
    else:
        sample, cache = search_random(gallery, [0, 3, 4, 9, 20, 26, 29], k)
        embeddings = cache.embeddings(sample)
    statistics = compute_statistics(gallery, sample, cache.neighbors(sample))

    neighbors = search_images(gallery.bank, embeddings, sample, k)
    label = lambda index: -1 if labels is None else labels[index]  # noqa: E731
    pairs = [
        (query, rank, SimpleNamespace(id=index, similarity=similarity, age=age))
        for query, *columns in zip(sample.tolist(), *(values.tolist() for values in neighbors), strict=True)
        for rank, (index, similarity, age) in enumerate(zip(*columns, strict=True))
        if index >= 0
    ]
    compared = [(query, rank, other.id) for query, rank, other in pairs if min(label(query), label(other.id)) >= 0]
    matches = {(query, other): label(query) == label(other) for query, _, other in compared}
    summary = statistics.summary
    assert summary.images == len(sample)
    assert summary.purity == pytest.approx(mean([float(same) for same in matches.values()]))
    ranks = range(max(rank for _, rank, _ in pairs) + 1)
    for rank in ranks:
        here = [float(matches[query, other]) for query, at, other in compared if at == rank]
        assert summary.purity_by_rank[rank] == pytest.approx(mean(here))
        similar = [other.similarity for _, at, other in pairs if at == rank]
        assert summary.similarity_by_rank[rank] == pytest.approx(mean(similar))
    assert len(summary.purity_by_rank) == len(summary.similarity_by_rank) == len(ranks)
    assert summary.similarity == pytest.approx(mean([other.similarity for _, _, other in pairs]))
    ages = [other.age for _, _, other in pairs]
    assert summary.age == (pytest.approx(mean(ages)) if searched == "bank" else None)

    shares = []
    for query in sample.tolist():
        others = [label(index) for index in ids if index != query and label(index) >= 0]
        if label(query) >= 0 and others:
            shares.append(others.count(label(query)) / len(others))
    assert summary.chance == pytest.approx(mean(shares))

    times = Counter(other.id for _, _, other in pairs)
    assert statistics.never_retrieved == pytest.approx(np.mean([times[index] == 0 for index in set(ids)]))
    assert [hub.retrieved for hub in statistics.hubs] == [number for _, number in times.most_common(12)]
    for hub in statistics.hubs:
        assert hub.retrieved == times[hub.node]
        theirs = [float(same) for (_, other), same in matches.items() if other == hub.node]
        assert hub.matching == pytest.approx(mean(theirs))

    by_class = {}
    for number in range(3):
        here = [float(same) for (query, _), same in matches.items() if label(query) == number]
        if here:
            by_class[f"class {number}"] = (mean(here), sum(label(query) == number for query in sample.tolist()))
    assert by_class == {row.name: (pytest.approx(row.purity), row.images) for row in statistics.purity_by_class}
    assert all(row.interval[0] <= row.purity <= row.interval[1] for row in statistics.purity_by_class)
    purities = [row.purity for row in statistics.purity_by_class]
    assert purities == sorted(purities)

    for histogram, values in (
        (statistics.similarity, [other.similarity for _, _, other in pairs]),
        (statistics.age, [other.age for _, _, other in pairs]),
    ):
        if histogram is None:
            assert searched == "dataset"
            continue
        assert (np.diff(histogram.edges) > 0).all()
        assert len(histogram.matching) == len(histogram.others) == len(histogram.edges) - 1
        assert histogram.matching.sum() == sum(matches.values())
        for number, (low, high) in enumerate(pairwise(histogram.edges)):
            last = number == len(histogram.matching) - 1
            inside = [
                matches.get((query, other.id), False)
                for (query, _, other), value in zip(pairs, values, strict=True)
                if low <= value < high or (last and value == high)
            ]
            assert (histogram.matching[number], histogram.others[number]) == (sum(inside), inside.count(False))


def test_statistics_of_one_image() -> None:
    gallery = make_gallery(1, [0], labels=[0], searched="dataset")
    cache = ImageCache(gallery, 1)
    sample = cache.sample(1, seed=0)
    statistics = compute_statistics(gallery, sample, cache.neighbors(sample))
    assert dataclasses.astuple(statistics.summary) == (1, None, None, None, (), None, (), None)
    assert (statistics.hubs, statistics.purity_by_class, statistics.never_retrieved) == ((), (), 1)
    assert statistics.similarity.others.sum() == 0


def test_histogram_of_equal_similarities() -> None:
    gallery = make_gallery(5, list(range(5)), searched="dataset", vectors=unit(1, 8, seed=0).repeat(5, 1))
    cache = ImageCache(gallery, 4)
    sample = cache.sample(1, seed=0)
    histogram = compute_statistics(gallery, sample, cache.neighbors(sample)).similarity
    assert histogram.others.sum() == 20
    assert (np.diff(histogram.edges) > 0).all()


def test_interval_of_single_neighbours_is_wilsons() -> None:
    same = np.repeat([1, 0], [13, 87])
    p, n, z = 0.13, 99, 1.959964  # one less, as the variance is estimated
    center, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(center + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert purity_interval(same, np.ones(100, np.int64)) == pytest.approx(expected)


def test_interval_of_unanimous_neighbours_counts_queries() -> None:
    """0 of the 48 neighbours of six queries leaves room for the 13 % of a large sample."""
    low, high = purity_interval(np.zeros(6, np.int64), np.full(6, 8))
    assert (low, high) == (0, pytest.approx(0.390, abs=1e-3))
    assert purity_interval(np.full(6, 8), np.full(6, 8)) == (pytest.approx(1 - high), 1)
    assert purity_interval(np.zeros(3, np.int64), np.zeros(3, np.int64)) is None


def test_interval_covers_the_purity_in_95_of_100_samples() -> None:
    """The neighbours of one query resemble each other: as independent ones they would give too narrow an interval."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(1000):
        compared = rng.integers(5, 11, size=40)
        low, high = purity_interval(rng.binomial(compared, rng.beta(0.5, 1.5, size=40)), compared)
        covered.append(low <= 0.25 <= high)
    assert 0.925 < np.mean(covered) < 0.975


def test_worst_first() -> None:
    """Pairs on a circle: 0 and 1 close with different labels, 2 and 3 less close, 4 and 5 same label, 6 unlabelled."""
    angles = torch.tensor([0.0, 0.01, 1.5, 1.6, 3.0, 3.2, 4.5])
    gallery = make_gallery(
        7,
        list(range(7)),
        labels=[0, 1, 0, 1, 2, 2, -1],
        searched="dataset",
        vectors=torch.stack([angles.cos(), angles.sin()], dim=1),
    )
    cache = ImageCache(gallery, 1)
    sample = cache.sample(1, seed=0)
    assert worst_first(gallery, sample, cache.neighbors(sample)) == [0, 1, 2, 3, 4, 5]


def test_worst_needs_labels() -> None:
    gallery = make_gallery(4, list(range(4)), labels=[-1, 0, -1, -1], searched="dataset")
    cache = ImageCache(gallery, 3)
    sample = cache.sample(1, seed=0)
    with pytest.raises(UserError, match="none of 4 images has a label and a labelled neighbour"):
        worst_first(gallery, sample, cache.neighbors(sample))


def test_too_many_neighbours_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"1,001 neighbours of many images take too much memory; --k can be at most 1000"
    ):
        ImageCache(make_gallery(3, [0, 1, 2]), 1001)
