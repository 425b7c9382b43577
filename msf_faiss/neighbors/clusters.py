"""Clusters of what is searched, by k-means.

Shapes: n images, M members shown.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.errors import UserError
from msf_faiss.neighbors.gallery import Gallery
from msf_faiss.neighbors.page_content import Cluster
from msf_faiss.search.kmeans import spherical_kmeans

_MEMBERS = 12


def images_once(gallery: Gallery) -> tuple[NDArray[np.int64], Tensor]:
    """Ids [n], rising, and embeddings [n, D] of all that is searched, each image by its newest entry."""
    slots = gallery.searchable_slots().flip(0)  # the newest first
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
    """Clusters of images by their cosine, the largest first; members are named by their ids.

    Args:
        ids: [n] of the images.
        embeddings: [n, D] float32, unit norm.
        labels: [N] of all training images, -1 where there is none.
        classes: names by label.
        clusters: how many; empty ones are left out.
        seed: of the first centroids and the members.
        members: images of each cluster to show, at random.

    Raises:
        UserError: if there are fewer images than clusters.
    """
    if clusters > len(ids):
        raise UserError(f"{len(ids):,} different images cannot be {clusters:,} clusters; lower --clusters")
    assigned = spherical_kmeans(embeddings, clusters, seed).numpy()  # [n]
    rng = np.random.default_rng(seed)
    sizes = np.bincount(assigned)
    found = []
    for number in np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]:
        inside = ids[assigned == number]
        labelled = labels[inside][labels[inside] >= 0]
        by_class = np.bincount(labelled, minlength=1)
        named = classes is not None and len(labelled) > 0
        found.append(
            Cluster(
                size=len(inside),
                members=tuple(rng.permutation(inside)[:members].tolist()),
                class_name=classes[int(by_class.argmax())] if classes is not None and named else None,
                share=float(by_class.max() / len(labelled)) if named else None,
            )
        )
    return tuple(found)
