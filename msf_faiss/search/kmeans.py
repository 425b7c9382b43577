"""Clusters of unit vectors, by FAISS's k-means.

Shapes: N vectors, K clusters, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msf_faiss.search.faiss_setup import faiss

_ITERATIONS = 25
# Of several attempts the best is kept. Of 16 clear groups four attempts in five join some; one takes longer the more
# clusters there are, and matters less.
_LEAST_ATTEMPTS, _MOST_ATTEMPTS, _ATTEMPTED_CLUSTERS = 3, 20, 320
_MOST_POINTS = 1 << 18  # from which centroids are learned, at random; all vectors are assigned


def spherical_kmeans(vectors: Tensor, clusters: int, seed: int) -> Tensor:
    """The cluster [N] int64 of each of `vectors` [N, D], by cosine; some clusters may stay empty.

    Computed on the CPU; the same seed gives the same clusters.

    Args:
        vectors: float32, unit norm.
        clusters: K, 1 to N.
        seed: of the first centroids.

    Raises:
        ValueError: if there are fewer vectors than clusters.
    """
    if not 1 <= clusters <= len(vectors):
        raise ValueError(f"{len(vectors)} vectors cannot be {clusters} clusters")
    points = vectors.detach().cpu().contiguous().numpy()
    kmeans = faiss.Kmeans(
        points.shape[1],
        clusters,
        niter=_ITERATIONS,
        nredo=min(_MOST_ATTEMPTS, max(_LEAST_ATTEMPTS, _ATTEMPTED_CLUSTERS // clusters)),
        spherical=True,
        seed=seed % 2**31,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1,  # it would warn of fewer
        max_points_per_centroid=max(256, _MOST_POINTS // clusters),
    )
    kmeans.train(points)
    _, nearest = kmeans.index.search(points, 1)
    return torch.from_numpy(nearest[:, 0])
