"""Cluster the images of a gallery with k-means.

Shapes: N training images, n images of the gallery, D dimensions.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.errors import UserError
from msf_faiss.neighbors.gallery import Gallery
from msf_faiss.neighbors.page_content import Cluster
from msf_faiss.search.kmeans import spherical_kmeans

_MEMBERS = 12
_CLASSES = 3  # that a cluster names


def newest_entries(gallery: Gallery) -> tuple[NDArray[np.int64], Tensor]:
    """Ids [n], ascending, and embeddings [n, D] of the gallery's images, each represented by its newest entry."""
    slots = gallery.searchable_slots().flip(0)  # newest first
    ids, first = np.unique(gallery.entry_ids[slots.cpu().numpy()], return_index=True)
    return ids, gallery.bank.reconstruct(slots[torch.from_numpy(first).to(slots.device)])


def find_clusters(
    ids: NDArray[np.int64],
    embeddings: Tensor,
    labels: NDArray[np.int64],
    classes: tuple[str, ...] | None,
    *,
    clusters: int,
    seed: int,
    members: int = _MEMBERS,
) -> tuple[tuple[Cluster, ...], NDArray[np.int64]]:
    """Spherical k-means clusters, largest first, whose members are ids; and the index of each image's cluster: [n].

    Args:
        ids: [n] of the images.
        embeddings: [n, D] float32, unit norm.
        labels: [N] of all training images, -1 for unlabelled ones.
        classes: names by label.
        clusters: how many; empty ones are left out.
        seed: of the initial centroids and of the members.
        members: number of random members to return of each cluster.

    Raises:
        UserError: if there are fewer images than clusters.
    """
    if clusters > len(ids):
        raise UserError(f"{clusters:,} clusters need at least as many images, found {len(ids):,}; lower --clusters")
    assigned = spherical_kmeans(embeddings, clusters, seed).numpy()  # [n]
    rng = np.random.default_rng(seed)
    sizes = np.bincount(assigned)
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    result = []
    for number in order:
        inside = ids[assigned == number]
        labelled = labels[inside][labels[inside] >= 0]
        by_class = np.bincount(labelled)
        largest = np.argsort(-by_class, kind="stable")[: min(_CLASSES, np.count_nonzero(by_class))].tolist()
        result.append(
            Cluster(
                size=len(inside),
                members=tuple(rng.permutation(inside)[:members].tolist()),
                classes=()
                if classes is None
                else tuple((classes[label], float(by_class[label] / len(labelled))) for label in largest),
            )
        )
    index = np.empty(len(sizes), np.int64)
    index[order] = np.arange(len(order))
    return tuple(result), index[assigned]
