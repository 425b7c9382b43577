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
) -> tuple[Cluster, ...]:
    """Spherical k-means clusters, largest first, whose members are ids.

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
    result = []
    for number in np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]:
        inside = ids[assigned == number]
        labelled = labels[inside][labels[inside] >= 0]
        by_class = np.bincount(labelled, minlength=1)
        named = classes is not None and len(labelled) > 0
        result.append(
            Cluster(
                size=len(inside),
                members=tuple(rng.permutation(inside)[:members].tolist()),
                class_name=classes[int(by_class.argmax())] if classes is not None and named else None,
                share=float(by_class.max() / len(labelled)) if named else None,
            )
        )
    return tuple(result)
