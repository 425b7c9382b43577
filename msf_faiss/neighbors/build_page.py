"""From a checkpoint to all that a page of neighbours holds.

Shapes: Q queries, K neighbours, P images of the page, M points of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from msf_faiss.checkpoint.format import Checkpoint
from msf_faiss.device import CPU
from msf_faiss.neighbors.clusters import find_clusters, images_once
from msf_faiss.neighbors.evolution import earlier_checkpoints
from msf_faiss.neighbors.gallery import Gallery, open_gallery, thumbnail
from msf_faiss.neighbors.inspection import (
    Queries,
    balanced_choice,
    embed_queries,
    inspection_of,
    refuse_unlabelled,
    selection_of,
)
from msf_faiss.neighbors.lookup import Lookup
from msf_faiss.neighbors.page_content import Cluster, EmbeddingMap, Explorer, Graph, Moment, Nodes
from msf_faiss.neighbors.page_images import Grown, grow
from msf_faiss.neighbors.records import Inspection, Searched
from msf_faiss.neighbors.retrieval import ImageNeighbors, search_images
from msf_faiss.neighbors.statistics import count, match, worst_first
from msf_faiss.text import printable

_ON_MAP = 3000


class Exploration(NamedTuple):
    """What the queries retrieved, and the page around them."""

    inspection: Inspection  # without thumbnails
    explorer: Explorer


def explore(
    checkpoint: Checkpoint,
    *,
    queries: int = 12,
    files: Sequence[Path] = (),
    ids: Sequence[int] = (),
    worst: bool = False,
    k: int = 10,
    searched: Searched = "bank",
    sample: int = 2000,
    page_images: int = 3000,
    moments: int = 0,
    clusters: int = 0,
    map_method: Literal["pca", "tsne"] | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    device: torch.device = CPU,
    notify: Callable[[str], object] = lambda line: None,
) -> Exploration:
    """Everything that a page of neighbours shows.

    The page's images are the queries, their neighbours, what the other parts of the page name, and then neighbours of
    neighbours, breadth first. What `inspect` has too means the same here; a query named twice counts once.

    Args:
        checkpoint: gives the encoder and the bank.
        queries: see `inspect`.
        files: see `inspect`.
        ids: see `inspect`.
        worst: see `inspect`.
        k: neighbours of each image.
        searched: see `inspect`.
        sample: random images for the statistics; all, if the data set is searched.
        page_images: images of the page; more, if its parts name more.
        moments: checkpoints of the run at which to ask the queries, this one counted; 0: none but this one.
        clusters: of k-means, over the bank's images or the data set's; 0: none.
        map_method: how to draw the map; None: no map.
        overrides: see `inspect`.
        seed: of all random choices.
        device: where to embed and search.
        notify: is told in a line what is done next.

    Raises:
        UserError: see `inspect`; if there are too few checkpoints for an evolution, or images for clusters or a map.
        ValueError: if queries, k, sample or page_images is below 1, moments is 1, or clusters is below 0.
    """
    if min(queries, k, sample, page_images) < 1 or moments == 1 or min(moments, clusters) < 0:
        raise ValueError("queries, k, sample and page_images are at least 1, moments 0 or at least 2, clusters 0")
    before = earlier_checkpoints(checkpoint, moments, searched, notify) if moments else []
    gallery = open_gallery(checkpoint, searched=searched, overrides=overrides, device=device)
    files, ids = list(dict.fromkeys(files)), list(dict.fromkeys(ids))
    order = selection_of(files, ids, worst=worst)
    if order == "worst":
        refuse_unlabelled(gallery)
        asked_for = None
    else:  # a wrong query is found before all images are embedded
        chosen = ids if order == "chosen" else balanced_choice(gallery.source, queries, seed)
        asked_for = embed_queries(gallery, files, chosen)

    total = len(gallery.source)
    most = min(k, total)  # neighbours that there can be
    notify(
        f"embedding and searching {min(sample, total):,} random images for the statistics"
        if searched == "bank"
        else f"embedding {total:,} images, and searching all for each"
    )
    lookup = Lookup(gallery, most, len(files))
    asked = lookup.sample(sample, seed)
    found = lookup.neighbors(asked)
    statistics = count(gallery, asked, found)
    if asked_for is None:
        asked_for = embed_queries(gallery, (), worst_first(gallery, asked, found)[:queries])
    inspection = inspection_of(gallery, asked_for, k, order, seed, thumbnails=False)

    keys = _keys(asked_for, total)
    labels = np.append(gallery.labels, np.full(len(files), -1))  # by key
    now = _as_arrays(inspection, most)
    lookup.put(keys, asked_for.embeddings, list(map(thumbnail, asked_for.crops)), now)

    over_time = [(earlier, _ask_again(gallery, earlier, asked_for, most, notify)) for earlier in before]
    if before:
        over_time.append((checkpoint, now))
    groups: tuple[Cluster, ...] = ()
    if clusters:
        notify(f"finding {clusters} clusters")
        groups = find_clusters(*images_once(gallery), gallery.labels, gallery.classes, clusters=clusters, seed=seed)

    notify("collecting the neighbours of neighbours")
    required = [
        *(other for _, then in over_time for other in then.ids.ravel().tolist() if other >= 0),
        *(member for cluster in groups for member in cluster.members),
        *(hub.node for hub in statistics.hubs),
    ]
    anywhere = np.random.default_rng(seed).permutation(np.unique(gallery.entry_ids)).tolist()
    page = grow(keys.tolist(), required, page_images, lambda some: lookup.neighbors(some).ids, anywhere)
    place = np.full(len(labels) + 1, -1)  # of each key on the page; -1 is nowhere
    place[page.keys] = np.arange(len(page.keys))
    nearest = _nearest_on_page(lookup, page)
    columns = slice(max(each.most for each in (nearest, *(then for _, then in over_time))))
    explorer = Explorer(
        protocol=inspection.protocol,
        classes=gallery.classes,
        nodes=Nodes(
            ids=np.where(page.keys < total, page.keys, -1),
            names=tuple(
                printable(gallery.source.name(key)) if key < total else asked_for.names[key - total]
                for key in page.keys.tolist()
            ),
            labels=labels[page.keys],
            pictures=tuple(lookup.pictures(page.keys)),
        ),
        graph=Graph(
            neighbors=place[nearest.ids[:, columns]],
            similarities=nearest.similarities[:, columns],
            ages=nearest.ages[:, columns] if searched == "bank" else None,
            complete=page.complete,
        ),
        queries=tuple(place[keys].tolist()),
        order=order,
        statistics=replace(statistics, hubs=tuple(replace(hub, node=int(place[hub.node])) for hub in statistics.hubs)),
        evolution=tuple(
            Moment(
                step=when.step,
                epoch=when.epoch,
                neighbors=place[then.ids[:, columns]],
                similarities=then.similarities[:, columns],
                purity=match(labels[keys], then.ids, gallery.labels).purity(),
            )
            for when, then in over_time
        ),
        clusters=tuple(replace(cluster, members=tuple(place[list(cluster.members)].tolist())) for cluster in groups),
        map=None if map_method is None else _draw(lookup, page, len(keys), map_method, seed, notify),
    )
    return Exploration(inspection, explorer)


def _keys(queries: Queries, total: int) -> NDArray[np.int64]:
    """[Q] of the queries, see `lookup`; the files are the first of them."""
    return np.array([total + place if index is None else index for place, index in enumerate(queries.ids)], np.int64)


def _as_arrays(inspection: Inspection, k: int) -> ImageNeighbors:
    """What the queries retrieved, so that the table and the page cannot differ."""
    found = ImageNeighbors.empty(len(inspection.queries), k)
    for row, query in enumerate(inspection.queries):
        for column, neighbor in enumerate(query.neighbors):
            found.ids[row, column] = neighbor.id
            found.similarities[row, column] = neighbor.similarity
            found.ages[row, column] = -1 if neighbor.age is None else neighbor.age
    return found


def _ask_again(
    gallery: Gallery, checkpoint: Checkpoint, queries: Queries, k: int, notify: Callable[[str], object]
) -> ImageNeighbors:
    """What the queries retrieved at an earlier checkpoint."""
    notify(f"asking the checkpoint of step {checkpoint.step:,}")
    then = gallery.at(checkpoint)
    ids = np.array([-1 if index is None else index for index in queries.ids], np.int64)
    return search_images(then.bank, then.embed_views(queries.crops), ids, k)


def _nearest_on_page(lookup: Lookup, page: Grown) -> ImageNeighbors:
    """The neighbours of each image of the page; those of incomplete ones among the page's images alone."""
    found = lookup.neighbors(page.keys)
    if page.complete.all():
        return found
    among = lookup.neighbors_among(page.keys[~page.complete], page.keys)
    row = np.arange(len(page.keys))  # of each image in both together
    row[~page.complete] = len(row) + np.arange(len(among.ids))
    return ImageNeighbors.joined([found, among]).of(row)


def _draw(
    lookup: Lookup,
    page: Grown,
    queries: int,
    method: Literal["pca", "tsne"],
    seed: int,
    notify: Callable[[str], object],
) -> EmbeddingMap:
    """A map of the queries, which are the page's first images, and of random others."""
    from msf_faiss.neighbors.embedding_map import draw_map  # scikit-learn takes seconds to import

    others = queries + np.random.default_rng(seed).permutation(len(page.keys) - queries)
    nodes = np.append(np.arange(queries), np.sort(others[: max(0, _ON_MAP - queries)]))  # [M]
    notify(f"drawing a map of {len(nodes):,} images")
    positions, note = draw_map(lookup.embeddings(page.keys[nodes]).cpu().numpy(), method, seed)
    return EmbeddingMap(method=method, nodes=nodes, positions=positions, note=note)
