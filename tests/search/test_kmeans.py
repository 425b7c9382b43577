"""Spherical k-means."""

import pytest
import torch

from msf_faiss.search.kmeans import spherical_kmeans


def blobs() -> torch.Tensor:
    """Return 16 well separated groups of 20 vectors."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(16, 32, generator=generator), dim=1)
    noise = 0.05 * torch.randn(320, 32, generator=generator)
    return torch.nn.functional.normalize(centres.repeat_interleave(20, dim=0) + noise, dim=1)


@pytest.mark.parametrize("seed", [0, 1, 5, 2**40])
def test_finds_separated_groups_with_any_seed(seed: int) -> None:
    assigned = spherical_kmeans(blobs(), 16, seed)
    assert (assigned.view(16, 20) == assigned.view(16, 20)[:, :1]).all()
    assert len(assigned.unique()) == 16
    assert torch.equal(assigned, spherical_kmeans(blobs(), 16, seed))


def test_vectors_are_in_the_cluster_of_the_nearest_centre() -> None:
    """Lloyd's condition."""
    vectors = torch.nn.functional.normalize(torch.randn(500, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assigned = spherical_kmeans(vectors, 5, seed=0)
    sums = torch.zeros(5, 4).index_add(0, assigned, vectors)
    similarities = vectors @ torch.nn.functional.normalize(sums, dim=1).T  # [N, K]
    # After 25 rounds a few vectors at the borders still move.
    assert (similarities.argmax(dim=1) == assigned).float().mean() > 0.97


def test_number_of_clusters() -> None:
    vectors = torch.eye(5)
    assert sorted(spherical_kmeans(vectors, 5, seed=0).tolist()) == list(range(5))
    assert spherical_kmeans(vectors[:1], 1, seed=0).tolist() == [0]
    for clusters in (0, 6):
        with pytest.raises(ValueError, match=f"5 vectors cannot form {clusters} clusters"):
            spherical_kmeans(vectors, clusters, seed=0)
