"""Near-duplicates and outliers, against a comparison of every pair."""

import numpy as np
import pytest
import torch
from galleries import make_gallery, unit

from msf_faiss.neighbors.image_cache import ImageCache
from msf_faiss.neighbors.image_search import ImageNeighbors
from msf_faiss.neighbors.review import find_outliers, near_duplicates


@pytest.mark.parametrize("k", [1, 6])
def test_pairs_and_outliers_equal_a_comparison_of_all(k: int) -> None:
    vectors = unit(60, 8, seed=0)
    vectors[41] = torch.nn.functional.normalize(vectors[7] + 1e-3, dim=0)  # nearly the same
    gallery = make_gallery(60, list(range(60)), searched="dataset", vectors=vectors)
    cache = ImageCache(gallery, k)
    sample = cache.sample(1, seed=0)
    neighbors = cache.neighbors(sample)
    pairs = near_duplicates(sample, neighbors, cache.embeddings)
    cosines = (vectors.double() @ vectors.double().T).numpy()
    expected = sorted(((one, two) for two in range(60) for one in range(two)), key=lambda pair: -cosines[pair])
    assert [pair[:2] for pair in pairs] == expected[:6]  # one for ten images
    assert pairs[0][:2] == (7, 41)
    assert [pair[2] for pair in pairs] == pytest.approx([cosines[pair] for pair in expected[:6]])
    nearest = -np.sort(-(cosines - 2 * np.eye(60)), axis=1)[:, :k].mean(axis=1)
    outliers = find_outliers(sample, neighbors)
    assert [image for image, _ in outliers] == np.argsort(nearest)[:3].tolist()  # one of twenty
    assert [mean for _, mean in outliers] == pytest.approx(np.sort(nearest)[:3], abs=1e-6)


def test_pairs_of_a_bank_are_compared_again_by_the_embeddings_of_today() -> None:
    """By the bank's entries the pair 0 is nearest, then 1, then 2; by the encoder it is the other way round."""
    found = np.linspace(1, 0.5, 20, dtype=np.float32)[:, None]
    neighbors = ImageNeighbors(np.arange(20, 40)[:, None], found, np.zeros((20, 1), np.int64))
    angles = torch.zeros(40)
    angles[20:23] = torch.tensor([1.5, 1.0, 0.5])
    now = torch.stack([angles.cos(), angles.sin()], dim=1)
    pairs = near_duplicates(np.arange(20), neighbors, lambda ids: now[torch.from_numpy(ids)])
    assert pairs == [(2, 22, pytest.approx(np.cos(0.5))), (1, 21, pytest.approx(np.cos(1.0)))]


def test_images_without_neighbors_are_in_no_list() -> None:
    none = ImageNeighbors(np.array([[-1], [-1]]), np.zeros((2, 1), np.float32), np.full((2, 1), -1))
    assert near_duplicates(np.array([0, 1]), none, lambda ids: torch.zeros(len(ids), 2)) == []
    assert find_outliers(np.array([0, 1]), none) == []
    empty = ImageNeighbors.empty(1, 0)
    assert near_duplicates(np.array([0]), empty, lambda ids: torch.zeros(len(ids), 2)) == []
