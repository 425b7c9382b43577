"""Statistics of many neighbours, against a twin that goes through them one by one."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from galleries import make_gallery, unit

from msf_faiss.errors import UserError
from msf_faiss.neighbors.gallery import Gallery
from msf_faiss.neighbors.inspection import retrieve
from msf_faiss.neighbors.lookup import Lookup
from msf_faiss.neighbors.statistics import count, worst_first


def asked_of(gallery: Gallery, asked: list[int], k: int) -> tuple[np.ndarray, Lookup]:
    """Images asked with random embeddings."""
    lookup = Lookup(gallery, k)
    ids = np.array(asked)
    gallery.embed_views = lambda crops: unit(len(crops), 8, seed=1)
    gallery.views = lambda some: [(some, torch.zeros(len(some), 3, 8, 8, dtype=torch.uint8))]
    lookup.neighbors(ids)
    return ids, lookup


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


@pytest.mark.parametrize("k", [1, 4, 40])
@pytest.mark.parametrize("labelled", ["all", "some", "none"])
@pytest.mark.parametrize("searched", ["bank", "dataset"])
def test_statistics_equal_a_count_by_hand(k: int, labelled: str, searched: str) -> None:
    rng = np.random.default_rng(k)
    labels = None if labelled == "none" else rng.integers(0 if labelled == "all" else -1, 3, size=30).tolist()
    ids = list(range(30)) if searched == "dataset" else rng.integers(25, size=60).tolist()
    gallery = make_gallery(30, ids, labels=labels, searched=searched)
    if searched == "dataset":
        lookup = Lookup(gallery, k)
        asked = lookup.sample(5, seed=0)
        assert asked.tolist() == list(range(30))
        embeddings = gallery.bank.reconstruct(torch.arange(30))
    else:
        asked, lookup = asked_of(gallery, [0, 3, 4, 9, 20, 26, 29], k)
        embeddings = lookup.embeddings(asked)
    statistics = count(gallery, asked, lookup.neighbors(asked))

    answers = retrieve(gallery.bank, embeddings, asked.tolist(), k)
    label = lambda index: -1 if labels is None else labels[index]  # noqa: E731
    pairs = [
        (query, rank, found)
        for query, answer in zip(asked.tolist(), answers, strict=True)
        for rank, found in enumerate(answer.others)
    ]
    compared = [(query, rank, found.id) for query, rank, found in pairs if min(label(query), label(found.id)) >= 0]
    matches = {(query, other): label(query) == label(other) for query, _, other in compared}
    assert statistics.images == len(asked)
    assert statistics.purity == pytest.approx(mean([float(same) for same in matches.values()]))
    ranks = range(max(rank for _, rank, _ in pairs) + 1)
    for rank in ranks:
        here = [float(matches[query, other]) for query, at, other in compared if at == rank]
        assert statistics.purity_by_rank[rank] == pytest.approx(mean(here))
        similar = [found.similarity for _, at, found in pairs if at == rank]
        assert statistics.similarity_by_rank[rank] == pytest.approx(mean(similar))
    assert len(statistics.purity_by_rank) == len(statistics.similarity_by_rank) == len(ranks)

    shares = []
    for query in asked.tolist():
        others = [label(index) for index in ids if index != query and label(index) >= 0]
        if label(query) >= 0 and others:
            shares.append(others.count(label(query)) / len(others))
    assert statistics.chance == pytest.approx(mean(shares))

    times = Counter(found.id for _, _, found in pairs)
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
            by_class[f"class {number}"] = (mean(here), sum(label(query) == number for query in asked.tolist()))
    found_by_class = {name: (pytest.approx(purity), images) for name, purity, images in statistics.purity_by_class}
    assert by_class == found_by_class
    purities = [purity for _, purity, _ in statistics.purity_by_class]
    assert purities == sorted(purities)

    for histogram, values in (
        (statistics.similarity, [found.similarity for _, _, found in pairs]),
        (statistics.age, [found.age for _, _, found in pairs]),
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
                matches.get((query, found.id), False)
                for (query, _, found), value in zip(pairs, values, strict=True)
                if low <= value < high or (last and value == high)
            ]
            assert (histogram.matching[number], histogram.others[number]) == (sum(inside), inside.count(False))


def test_one_image_has_no_neighbours_and_nothing_to_tell() -> None:
    gallery = make_gallery(1, [0], labels=[0], searched="dataset")
    lookup = Lookup(gallery, 1)
    asked = lookup.sample(1, seed=0)
    statistics = count(gallery, asked, lookup.neighbors(asked))
    assert (statistics.images, statistics.purity, statistics.chance, statistics.hubs) == (1, None, None, ())
    assert (statistics.purity_by_rank, statistics.purity_by_class, statistics.never_retrieved) == ((), (), 1)
    assert statistics.similarity.others.sum() == 0


def test_equal_similarities_still_have_a_histogram() -> None:
    gallery = make_gallery(5, list(range(5)), searched="dataset", vectors=unit(1, 8, seed=0).repeat(5, 1))
    lookup = Lookup(gallery, 4)
    asked = lookup.sample(1, seed=0)
    histogram = count(gallery, asked, lookup.neighbors(asked)).similarity
    assert histogram.others.sum() == 20
    assert (np.diff(histogram.edges) > 0).all()


def test_the_worst_are_those_whose_neighbours_have_other_labels() -> None:
    """Pairs on a circle: 0 and 1 wrong and near, 2 and 3 wrong and less near, 4 and 5 right, 6 unlabelled."""
    angles = torch.tensor([0.0, 0.01, 1.5, 1.6, 3.0, 3.2, 4.5])
    gallery = make_gallery(
        7,
        list(range(7)),
        labels=[0, 1, 0, 1, 2, 2, -1],
        searched="dataset",
        vectors=torch.stack([angles.cos(), angles.sin()], dim=1),
    )
    lookup = Lookup(gallery, 1)
    asked = lookup.sample(1, seed=0)
    assert worst_first(gallery, asked, lookup.neighbors(asked)) == [0, 1, 2, 3, 4, 5]


def test_without_labels_there_is_no_worst() -> None:
    gallery = make_gallery(4, list(range(4)), labels=[-1, 0, -1, -1], searched="dataset")
    lookup = Lookup(gallery, 3)
    asked = lookup.sample(1, seed=0)
    with pytest.raises(UserError, match="none of 4 images has a label and a neighbour with one"):
        worst_first(gallery, asked, lookup.neighbors(asked))


def test_neighbours_that_would_fill_the_memory_are_refused() -> None:
    with pytest.raises(UserError, match=r"1,001 neighbours of each of many images are too many; --k 1000"):
        Lookup(make_gallery(3, [0, 1, 2]), 1001)
