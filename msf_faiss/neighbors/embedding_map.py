"""Project embeddings to two dimensions with PCA or t-SNE.

Shapes: M points, D dimensions.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from msf_faiss.errors import UserError
from msf_faiss.neighbors.page_content import MapMethod
from msf_faiss.threads import limit_blas

_FEWEST = 4  # points
_PERPLEXITY = 30.0
_SAME = 1e-6  # standard deviation below which coordinates differ only by rounding


def draw_map(embeddings: NDArray[np.float32], method: MapMethod, seed: int) -> tuple[NDArray[np.float32], str]:
    """Positions [M, 2] of `embeddings` [M, D] in 0..1, with one scale for both axes, and a note on how to read them.

    Identical embeddings are all placed in the middle.

    Raises:
        UserError: if there are fewer than 4.
    """
    if len(embeddings) < _FEWEST:
        raise UserError(f"--map needs at least {_FEWEST} images, found {len(embeddings)}; leave it out")
    points = embeddings.astype(np.float64)
    if points.std(axis=0).max() < _SAME:
        return np.full((len(points), 2), 0.5, np.float32), "all embeddings are identical"
    if points.shape[1] == 1:
        points = np.pad(points, [(0, 0), (0, 1)])
    with limit_blas(points.size * points.shape[1], torch.get_num_threads()):
        if method == "pca":
            pca = PCA(2, svd_solver="full")
            positions = pca.fit_transform(points)
            note = f"{pca.explained_variance_ratio_.sum():.0%} of the variance explained"
        else:
            perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
            tsne = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed % 2**32)
            positions = tsne.fit_transform(points)
            note = (
                f"perplexity {perplexity:.3g}; only close neighbours are meaningful, distances between groups are not"
            )
    low, high = positions.min(axis=0), positions.max(axis=0)
    centred = positions - (low + high) / 2
    return (0.5 + centred / (high - low).max()).clip(0, 1).astype(np.float32), note
