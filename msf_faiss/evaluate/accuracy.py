"""Accuracy of guesses when classes are of unequal size."""

import numpy as np
from numpy.typing import NDArray


def mean_per_class(guesses: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Mean over the classes of `labels` [M] of each class's accuracy: 0..1.

    Always guessing the same class scores 1 / classes, however common the class is.
    """
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return float((np.bincount(places, weights=guesses == labels) / counts).mean())
