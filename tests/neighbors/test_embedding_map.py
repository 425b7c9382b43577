"""Projections of embeddings."""

import numpy as np
import pytest
from galleries import unit

from msf_faiss.errors import UserError
from msf_faiss.neighbors.embedding_map import draw_map


def three_blobs(rows: int = 20) -> np.ndarray:
    axes = np.repeat(np.eye(8, dtype=np.float32)[:3], rows, axis=0)
    return axes + 0.05 * unit(3 * rows, 8, seed=0).numpy()


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_groups_stay_apart(method: str) -> None:
    positions, note = draw_map(three_blobs(), method, seed=0)
    assert (positions.shape, positions.dtype) == ((60, 2), np.float32)
    assert positions.min() >= 0
    assert positions.max() <= 1
    assert np.ptp(positions, axis=0).max() == pytest.approx(1)
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    group = np.arange(60) // 20
    same = group[:, None] == group
    assert distances[same].max() < distances[~same].min()
    assert ("variance" if method == "pca" else "perplexity 19.7") in note
    np.testing.assert_array_equal(positions, draw_map(three_blobs(), method, seed=0)[0])


def test_pca_equals_svd() -> None:
    vectors = unit(50, 8, seed=3).numpy()
    positions, note = draw_map(vectors, "pca", seed=0)
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    plane = left[:, :2] * values[:2]
    ours = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    theirs = np.linalg.norm(plane[:, None] - plane[None], axis=2)
    # both axes have the same scale, so ratios of distances are kept; positions are float32
    np.testing.assert_allclose(ours / ours.max(), theirs / theirs.max(), atol=1e-6)
    assert note.startswith(f"{(values[:2] ** 2).sum() / (values**2).sum():.0%} ")


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("images", [4, 5])
def test_map_of_few_images(method: str, images: int) -> None:
    positions, _ = draw_map(unit(images, 8, seed=0).numpy(), method, seed=0)
    assert np.isfinite(positions).all()
    with pytest.raises(UserError, match="needs at least 4 images, found 3"):
        draw_map(unit(3, 8, seed=0).numpy(), method, seed=0)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_map_of_identical_or_one_dimensional_embeddings(method: str) -> None:
    positions, note = draw_map(unit(1, 8, seed=0).numpy().repeat(6, axis=0), method, seed=0)
    assert (positions == 0.5).all()
    assert note == "all embeddings are identical"
    ones = np.array([[1], [-1], [1], [1], [-1]], np.float32)
    assert np.isfinite(draw_map(ones, method, seed=0)[0]).all()
