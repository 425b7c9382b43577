"""The random choice of queries."""

import numpy as np
import torch

from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.neighbors.queries import balanced_choice


def source(labels: list[int] | None) -> MemorySource:
    count = 100 if labels is None else len(labels)
    classes = None if labels is None else [f"class {label}" for label in range(max(labels, default=0) + 1)]
    return MemorySource(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), labels, classes, title="set")


def test_balanced_choice() -> None:
    labels = [0] * 90 + [1] * 7 + [2] * 3
    chosen = balanced_choice(source(labels), 12, seed=0)
    assert np.bincount([labels[index] for index in chosen]).tolist() in [[5, 4, 3], [4, 5, 3]]
    assert len(set(chosen)) == 12
    assert [labels[index] for index in chosen] == sorted(labels[index] for index in chosen)
    assert chosen == balanced_choice(source(labels), 12, seed=0)
    assert chosen != balanced_choice(source(labels), 12, seed=1)


def test_balanced_choice_of_fewer_images_than_classes() -> None:
    labels = [index % 10 for index in range(100)]
    drawn = {tuple(labels[index] for index in balanced_choice(source(labels), 4, seed)) for seed in range(20)}
    assert all(len(set(classes)) == 4 for classes in drawn)
    assert len(drawn) > 5  # not always the first four classes


def test_balanced_choice_of_unlabelled_or_few_images() -> None:
    assert len(set(balanced_choice(source(None), 7, seed=3))) == 7
    assert balanced_choice(source(None), 1000, seed=3) == list(range(100))
    assert balanced_choice(source([-1, 0, -1, 0]), 10, seed=0) == [1, 3]
    assert balanced_choice(source([0]), 3, seed=0) == [0]
