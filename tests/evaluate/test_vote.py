import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from msf_faiss.evaluate.vote import majority_vote, weighted_vote


def slow_majority(labels: list[int], similarities: list[float]) -> int:
    count: dict[int, int] = defaultdict(int)
    total: dict[int, float] = defaultdict(float)
    for label, similarity in zip(labels, similarities, strict=True):
        count[label] += 1
        total[label] += similarity
    return max(count, key=lambda label: (count[label], total[label], -labels.index(label)))


def slow_weighted(labels: list[int], similarities: list[float], temperature: float) -> int:
    total: dict[int, float] = defaultdict(float)
    for label, similarity in zip(labels, similarities, strict=True):
        total[label] += math.exp(similarity / temperature)
    return max(total, key=lambda label: (total[label], -labels.index(label)))


def voters(queries: int, k: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random voters; similarities are multiples of 1/8, so that sums tie often and exactly."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (queries, k), generator=generator)
    eighths = torch.randint(-8, 9, (queries, k), generator=generator)
    return labels, (eighths.float() / 8).sort(dim=1, descending=True).values


@pytest.mark.parametrize(("k", "classes"), [(1, 3), (2, 2), (4, 3), (7, 10), (30, 5)])
def test_majority_is_a_count_with_its_ties_resolved(k: int, classes: int) -> None:
    labels, similarities = voters(300, k, classes, seed=k)
    expected = [slow_majority(*pair) for pair in zip(labels.tolist(), similarities.tolist(), strict=True)]
    assert majority_vote(labels, similarities, classes).tolist() == expected


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_a_weighted_vote_is_a_sum_of_exponentials(temperature: float) -> None:
    labels, _ = voters(300, 9, 4, seed=0)
    similarities = torch.rand(300, 9, generator=torch.Generator().manual_seed(1)).sort(dim=1, descending=True).values
    expected = [slow_weighted(*pair, temperature) for pair in zip(labels.tolist(), similarities.tolist(), strict=True)]
    assert weighted_vote(labels, similarities, 4, temperature).tolist() == expected


def test_of_equally_many_the_more_similar_win_and_then_the_first() -> None:
    labels = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [2, 1, 1, 2]])
    similarities = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.65], [0.5, 0.5, 0.5, 0.5]])
    assert majority_vote(labels, similarities, 3).tolist() == [1, 0, 2]
    assert weighted_vote(labels[2:], similarities[2:], 3, 0.1).tolist() == [2]


def test_a_tiny_temperature_follows_the_nearest_and_does_not_overflow() -> None:
    labels, similarities = torch.tensor([[1, 0, 0]]), torch.tensor([[1.0, 0.99, 0.99]])
    assert weighted_vote(labels, similarities, 2, 1e-6).tolist() == [1]
    assert weighted_vote(labels, similarities, 2, 100.0).tolist() == [0]


def test_no_queries() -> None:
    labels, similarities = torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3)
    assert majority_vote(labels, similarities, 2).shape == (0,)
    assert weighted_vote(labels, similarities, 2, 0.1).shape == (0,)
