"""Images of a sample that deserve a look: near-duplicates, and outliers that resemble no other image.

Shapes: A sampled images, K neighbours of each, P pairs, D dimensions.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.neighbors.image_search import ImageNeighbors

_PAIRS, _OUTLIERS = 200, 100  # at most
_CANDIDATES = 1.5  # times as many pairs are compared again


def near_duplicates(
    sample: NDArray[np.int64], neighbors: ImageNeighbors, embed: Callable[[NDArray[np.int64]], Tensor]
) -> list[tuple[int, int, float]]:
    """Pairs of different images (ids, the lower first) and the cosine of their embeddings, the most similar first.

    Pairs are looked for among the sampled images [A] and their neighbours. A bank's entries are of older views, so the
    best pairs are compared again by the embeddings that `embed` gives for ids [P]: [P, D], unit norm. Returns one pair
    for ten sampled images, 200 at most.
    """
    most = min(_PAIRS, -(-len(sample) // 10))
    similarities = np.where(neighbors.ids >= 0, neighbors.similarities, -2).ravel()  # [A * K]
    pool = min(2 * int(_CANDIDATES * most), len(similarities))  # a pair is there twice if each retrieves the other
    if pool == 0:
        return []
    best = np.argpartition(-similarities, pool - 1)[:pool]
    best = best[similarities[best] > -2]
    best = best[np.lexsort((best, -similarities[best]))]
    one, two = np.repeat(sample, neighbors.ids.shape[1])[best], neighbors.ids.ravel()[best]
    pairs = list(dict.fromkeys(zip(np.minimum(one, two).tolist(), np.maximum(one, two).tolist(), strict=True)))
    pairs = pairs[: int(_CANDIDATES * most)]
    if not pairs:
        return []
    ids, rows = np.unique(np.array(pairs, np.int64), return_inverse=True)
    vectors = embed(ids).double().cpu()[torch.from_numpy(rows.reshape(-1, 2))]  # [P, 2, D]
    cosines = (vectors[:, 0] * vectors[:, 1]).sum(dim=1).clamp(-1, 1).tolist()
    rated = [(*pair, cosine) for pair, cosine in zip(pairs, cosines, strict=True)]
    return sorted(rated, key=lambda pair: (-pair[2], pair))[:most]


def find_outliers(sample: NDArray[np.int64], neighbors: ImageNeighbors) -> list[tuple[int, float]]:
    """Sampled images [A] by the mean cosine of their neighbours, the lowest first: one of twenty, 100 at most."""
    exists = neighbors.ids >= 0
    count = exists.sum(axis=1)  # [A]
    means = np.where(exists, neighbors.similarities, 0).sum(axis=1, dtype=np.float64) / np.maximum(count, 1)
    order = np.lexsort((sample, np.where(count == 0, np.inf, means)))  # [A]
    order = order[: min(_OUTLIERS, -(-len(sample) // 20), np.count_nonzero(count))]
    return list(zip(sample[order].tolist(), means[order].tolist(), strict=True))
