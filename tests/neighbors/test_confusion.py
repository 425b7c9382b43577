"""The confusion matrix of classes, against a count one by one."""

import numpy as np
import pytest

from msf_faiss.neighbors import confusion as module
from msf_faiss.neighbors.confusion import compute_confusion


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_confusion_equals_a_count_by_hand(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 6, size=50)
    labels[labels == 3] = 5  # a class without images
    queries, neighbors = rng.integers(-1, 6, size=30), rng.integers(-1, 50, size=(30, 4))
    queries[queries == 3] = 1
    expected = np.zeros((6, 6), np.int64)
    for label, row in zip(queries, neighbors, strict=True):
        for other in row:
            if label >= 0 and other >= 0 and labels[other] >= 0:
                expected[label, labels[other]] += 1
    every = compute_confusion(queries, neighbors, labels)
    assert every.labels.tolist() == [0, 1, 2, 4, 5]
    np.testing.assert_array_equal(every.counts, np.delete(np.delete(expected, 3, 0), 3, 1))
    np.testing.assert_array_equal(every.totals, every.counts.sum(axis=1))
    few = compute_confusion(queries, neighbors, labels, most=2)
    wrong = expected - np.diag(np.diag(expected))
    most = np.sort(np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)))[:2])
    assert (few.labels.tolist(), few.present) == (most.tolist(), 5)
    np.testing.assert_array_equal(few.counts, expected[np.ix_(most, most)])
    np.testing.assert_array_equal(few.totals, expected[most].sum(axis=1))


def test_unlabelled_images_have_no_confusion() -> None:
    neighbors = np.array([[1], [0]])
    assert compute_confusion(np.array([-1, 0]), neighbors, np.array([-1, 0])) is None
    assert compute_confusion(np.array([0, 0]), np.full((2, 0), -1), np.array([0, 0])) is None


def test_twenty_thousand_classes_need_no_matrix_of_all() -> None:
    labels = np.arange(20_000)
    found = compute_confusion(labels, np.roll(labels, 1)[:, None], labels)
    assert (found.counts.shape, found.present) == ((40, 40), 20_000)
