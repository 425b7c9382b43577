"""Clusters of a gallery."""

import numpy as np
import pytest
import torch
from galleries import make_gallery, unit

from msf_faiss.errors import UserError
from msf_faiss.neighbors.clusters import find_clusters, newest_entries


def blobs(sizes: list[int]) -> torch.Tensor:
    """Groups of vectors, each around an axis."""
    axes = torch.eye(8)[: len(sizes)].repeat_interleave(torch.tensor(sizes), dim=0)
    return torch.nn.functional.normalize(axes + 0.05 * unit(sum(sizes), 8, seed=0), dim=1)


def test_groups_become_clusters() -> None:
    sizes = [30, 50, 20]
    ids = np.arange(100) + 7
    labels = np.full(110, -1)
    labels[7:107] = np.repeat([0, 1, 2], sizes)
    labels[7:17] = 2  # ten of the first
    labels[37:39] = -1  # two of the second
    clusters, index = find_clusters(ids, blobs(sizes), labels, ("a", "b", "c"), clusters=3, seed=0, members=12)
    assert index.tolist() == np.repeat([1, 0, 2], sizes).tolist()
    assert [cluster.size for cluster in clusters] == [50, 30, 20]
    assert [cluster.classes for cluster in clusters] == [
        (("b", 1),),
        (("a", pytest.approx(20 / 30)), ("c", pytest.approx(10 / 30))),
        (("c", 1),),
    ]
    for cluster, (low, high) in zip(clusters, [(37, 87), (7, 37), (87, 107)], strict=True):
        assert len(set(cluster.members)) == 12
        assert all(low <= member < high for member in cluster.members)
    assert clusters == find_clusters(ids, blobs(sizes), labels, ("a", "b", "c"), clusters=3, seed=0)[0]
    members = {find_clusters(ids, blobs(sizes), labels, None, clusters=3, seed=seed)[0][0].members for seed in range(3)}
    assert len(members) == 3


def test_clusters_of_few_unlabelled_images(capfd: pytest.CaptureFixture[str]) -> None:
    labels = np.full(9, -1)
    (only,), _ = find_clusters(np.arange(9), blobs([9]), labels, None, clusters=1, seed=0)
    assert (only.size, only.classes, sorted(only.members)) == (9, (), list(range(9)))
    each, _ = find_clusters(np.arange(9), unit(9, 8, seed=1), labels, ("a",), clusters=9, seed=0)
    assert sorted(cluster.members for cluster in each) == [(index,) for index in range(9)]
    with pytest.raises(UserError, match="10 clusters need at least as many images, found 9; lower --clusters"):
        find_clusters(np.arange(9), blobs([9]), labels, None, clusters=10, seed=0)
    assert capfd.readouterr() == ("", "")  # no warnings from FAISS


def test_empty_clusters_are_left_out() -> None:
    vectors = unit(1, 8, seed=0).repeat(20, 1)
    clusters, index = find_clusters(np.arange(20), vectors, np.full(20, -1), None, clusters=4, seed=0)
    assert [cluster.size for cluster in clusters] == np.bincount(index).tolist()
    assert sum(cluster.size for cluster in clusters) == 20
    assert all(cluster.size for cluster in clusters)


def test_newest_entries() -> None:
    gallery = make_gallery(10, [4, 2, 4, 7, 2, 4], vectors=torch.eye(8)[:6])
    ids, embeddings = newest_entries(gallery)
    assert ids.tolist() == [2, 4, 7]
    assert embeddings.argmax(dim=1).tolist() == [4, 5, 3]
    aged = make_gallery(10, [4, 2, 4, 7, 2, 4], vectors=torch.eye(8)[:6], max_age=1)
    assert newest_entries(aged)[0].tolist() == [2, 4]
