"""Embeddings on a plane, by scikit-learn.

Shapes: M points, D dimensions.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from msf_faiss.errors import UserError

LEAST = 4
_PERPLEXITY = 30.0
_SAME = 1e-6  # below it the deviation of a coordinate is rounding


def draw_map(
    embeddings: NDArray[np.float32], method: Literal["pca", "tsne"], seed: int
) -> tuple[NDArray[np.float32], str]:
    """Positions [M, 2] in 0..1, one scale for both axes, of `embeddings` [M, D]; and a note for people.

    Embeddings that are all the same lie in the middle.

    Raises:
        UserError: if they are fewer than 4.
    """
    if len(embeddings) < LEAST:
        raise UserError(f"{len(embeddings)} images are too few for a map, which needs {LEAST}; leave --map out")
    points = embeddings.astype(np.float64)
    if points.std(axis=0).max() < _SAME:
        return np.full((len(points), 2), 0.5, np.float32), "all embeddings are the same"
    if points.shape[1] == 1:
        points = np.pad(points, [(0, 0), (0, 1)])
    if method == "pca":
        pca = PCA(2, svd_solver="full")
        positions = pca.fit_transform(points)
        note = f"{pca.explained_variance_ratio_.sum():.0%} of the variance is in these two dimensions"
    else:
        perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
        tsne = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed % 2**32)
        positions = tsne.fit_transform(points)
        note = f"perplexity {perplexity:.3g}: only who is near means something, distances between groups do not"
    low, high = positions.min(axis=0), positions.max(axis=0)
    centred = positions - (low + high) / 2
    return (0.5 + centred / (high - low).max()).clip(0, 1).astype(np.float32), note
