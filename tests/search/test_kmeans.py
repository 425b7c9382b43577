"""K-means of unit vectors."""

import pytest
import torch

from msf_faiss.search.kmeans import spherical_kmeans


def blobs() -> torch.Tensor:
    """16 groups of 20, far from each other."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(16, 32, generator=generator), dim=1)
    noise = 0.05 * torch.randn(320, 32, generator=generator)
    return torch.nn.functional.normalize(centres.repeat_interleave(20, dim=0) + noise, dim=1)


@pytest.mark.parametrize("seed", [0, 1, 5, 2**40])
def test_groups_are_found_whatever_the_seed(seed: int) -> None:
    assigned = spherical_kmeans(blobs(), 16, seed)
    assert (assigned.view(16, 20) == assigned.view(16, 20)[:, :1]).all()
    assert len(assigned.unique()) == 16
    assert torch.equal(assigned, spherical_kmeans(blobs(), 16, seed))


def test_each_vector_is_with_the_centre_of_its_cluster() -> None:
    """Lloyd's condition: no other cluster's mean direction is more similar."""
    vectors = torch.nn.functional.normalize(torch.randn(500, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assigned = spherical_kmeans(vectors, 5, seed=0)
    sums = torch.zeros(5, 4).index_add(0, assigned, vectors)
    similarities = vectors @ torch.nn.functional.normalize(sums, dim=1).T  # [N, K]
    # 25 rounds leave a few vectors at the borders unsettled
    assert (similarities.argmax(dim=1) == assigned).float().mean() > 0.97


def test_as_many_clusters_as_vectors_and_no_more() -> None:
    vectors = torch.eye(5)
    assert sorted(spherical_kmeans(vectors, 5, seed=0).tolist()) == list(range(5))
    assert spherical_kmeans(vectors[:1], 1, seed=0).tolist() == [0]
    for clusters in (0, 6):
        with pytest.raises(ValueError, match=f"5 vectors cannot be {clusters} clusters"):
            spherical_kmeans(vectors, clusters, seed=0)
