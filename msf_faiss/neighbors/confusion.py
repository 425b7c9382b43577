"""Which classes are neighbours of which: a confusion matrix of the classes that are confused most.

Shapes: A queries, K neighbours of each, N training images, P pairs of classes, C classes of the matrix.
"""

import numpy as np
from numpy.typing import NDArray

from msf_faiss.neighbors.page_content import Confusion

_CLASSES = 40  # of the matrix at most
_BLOCK = 1 << 16  # queries counted at a time


def compute_confusion(
    query_labels: NDArray[np.int64], neighbors: NDArray[np.int64], labels: NDArray[np.int64], most: int = _CLASSES
) -> Confusion | None:
    """Count the neighbours of each class among the neighbours of each class; None if there are none to count.

    Args:
        query_labels: [A] class index, -1 for an unlabelled query.
        neighbors: [A, K] ids, padded with -1; the query's own image is not among them.
        labels: [N] class index by id, -1 for an unlabelled image.
        most: classes of the matrix; of more, those that most neighbours of another class involve.
    """
    rows, columns, counts = _count_pairs(query_labels, neighbors, labels)  # [P] each
    if len(rows) == 0:
        return None
    present = np.union1d(rows, columns)
    wrong = np.where(rows == columns, 0, counts)
    involved = np.bincount(rows, wrong, present[-1] + 1) + np.bincount(columns, wrong, present[-1] + 1)
    shown = np.sort(present[np.argsort(-involved[present], kind="stable")[:most]])
    place = np.full(present[-1] + 1, -1)  # of a class in the matrix
    place[shown] = np.arange(len(shown))
    matrix = np.zeros((len(shown), len(shown)), np.int64)
    inside = (place[rows] >= 0) & (place[columns] >= 0)
    matrix[place[rows[inside]], place[columns[inside]]] = counts[inside]
    totals = np.bincount(rows, counts, present[-1] + 1).astype(np.int64)[shown]
    return Confusion(labels=shown, counts=matrix, totals=totals, present=len(present))


def _count_pairs(
    query_labels: NDArray[np.int64], neighbors: NDArray[np.int64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Class of the query, class of the neighbour, and the number of such neighbours: [P] each."""
    classes = int(labels.max(initial=-1)) + 1
    found, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, len(query_labels), _BLOCK):
        block = slice(start, start + _BLOCK)
        theirs = np.where(neighbors[block] < 0, -1, labels[neighbors[block]])  # [a, K]
        own = np.broadcast_to(query_labels[block, None], theirs.shape)
        compared = (own >= 0) & (theirs >= 0)
        pairs, times = np.unique(own[compared] * classes + theirs[compared], return_counts=True)
        found.append(pairs)
        counts.append(times)
    pairs, which = np.unique(np.concatenate(found), return_inverse=True)
    total = np.bincount(which, np.concatenate(counts), len(pairs)).astype(np.int64)
    rows, columns = np.divmod(pairs, max(1, classes))
    return rows, columns, total
