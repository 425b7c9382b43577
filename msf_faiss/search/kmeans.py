"""Clusters of unit vectors, by FAISS's k-means.

Shapes: N vectors, K clusters, D dimensions.
"""

import torch
from torch import Tensor

from msf_faiss.search.faiss_setup import faiss

_ITERATIONS = 25
# The best of several attempts counts: with 16 well separated groups, four attempts in five join some of them. With more
# clusters an attempt takes longer, and matters less.
_LEAST_ATTEMPTS, _MOST_ATTEMPTS, _ATTEMPTED_CLUSTERS = 3, 20, 320
_MOST_POINTS = 1 << 18  # vectors, chosen at random, that k-means runs on; all vectors are assigned


def spherical_kmeans(vectors: Tensor, clusters: int, seed: int) -> Tensor:
    """Cluster `vectors` [N, D] by cosine; return the cluster [N] int64 of each. Some clusters may be empty.

    Runs on the CPU; the same seed gives the same clusters.

    Args:
        vectors: float32, unit norm.
        clusters: K, 1 to N.
        seed: of the initial centroids.

    Raises:
        ValueError: if there are fewer vectors than clusters.
    """
    if not 1 <= clusters <= len(vectors):
        raise ValueError(f"{len(vectors)} vectors cannot form {clusters} clusters")
    points = vectors.detach().cpu().contiguous().numpy()
    kmeans = faiss.Kmeans(
        points.shape[1],
        clusters,
        niter=_ITERATIONS,
        nredo=min(_MOST_ATTEMPTS, max(_LEAST_ATTEMPTS, _ATTEMPTED_CLUSTERS // clusters)),
        spherical=True,
        seed=seed % 2**31,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1,  # suppresses a warning
        max_points_per_centroid=max(256, _MOST_POINTS // clusters),
    )
    kmeans.train(points)
    _, nearest = kmeans.index.search(points, 1)
    return torch.from_numpy(nearest[:, 0])
