"""Build the content of a page of neighbours from a checkpoint.

Shapes: Q queries, K neighbours, P images of the page, M points of the map.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from msf_faiss.checkpoint.format import Checkpoint
from msf_faiss.neighbors.clusters import find_clusters, newest_entries
from msf_faiss.neighbors.evolution import earlier_checkpoints
from msf_faiss.neighbors.gallery import Gallery, open_gallery, thumbnail
from msf_faiss.neighbors.image_cache import ImageCache
from msf_faiss.neighbors.image_search import ImageNeighbors, search_images
from msf_faiss.neighbors.inspection import make_inspection
from msf_faiss.neighbors.options import PageOptions
from msf_faiss.neighbors.page_content import Cluster, EmbeddingMap, Explorer, Graph, Moment, Nodes, Statistics
from msf_faiss.neighbors.page_images import PageImages, collect_page_images
from msf_faiss.neighbors.queries import Queries, choose_queries, embed_queries
from msf_faiss.neighbors.records import Inspection
from msf_faiss.neighbors.statistics import compare_labels, compute_statistics, worst_first
from msf_faiss.text import printable

_MAX_POINTS = 3000  # of the map

Notify = Callable[[str], object]


class BuiltPage(NamedTuple):
    """The inspection of the queries, and the content of the page around them."""

    inspection: Inspection  # without thumbnails
    explorer: Explorer


def build_page(checkpoint: Checkpoint, options: PageOptions, notify: Notify = lambda line: None) -> BuiltPage:
    """Inspect queries, and collect all that a page shows about them.

    The page has the queries, their neighbours, the images of its other parts, and then neighbours of neighbours,
    breadth first.

    Args:
        checkpoint: gives the encoder and the bank.
        options: of the queries and the page.
        notify: called with a line on what happens next.

    Raises:
        UserError: as `inspect` does; if there are too few checkpoints for the evolution, or images for clusters or map.
    """
    earlier = earlier_checkpoints(checkpoint, options.moments, options.searched, notify) if options.moments else []
    gallery = open_gallery(checkpoint, searched=options.searched, overrides=options.overrides, device=options.device)
    cache, queries, statistics = _sample(gallery, options, notify)
    images, k = len(gallery.source), min(options.k, len(gallery.source))
    neighbors = search_images(gallery.bank, queries.embeddings, queries.ids, k)
    inspection = make_inspection(gallery, queries, neighbors, options, thumbnails=False)
    keys = np.where(queries.ids < 0, images + np.arange(len(queries.ids)), queries.ids)  # [Q], see `image_cache`
    cache.add(keys, queries.embeddings, map(thumbnail, queries.views), neighbors)
    evolution = [(each, _search_at(gallery, each, queries, k, notify)) for each in earlier]
    if earlier:
        evolution.append((checkpoint, neighbors))
    clusters = _clusters(gallery, options, notify)

    notify("collecting neighbours of neighbours")
    required = [
        *(other for _, then in evolution for other in then.ids.ravel().tolist() if other >= 0),
        *(member for cluster in clusters for member in cluster.members),
        *(hub.node for hub in statistics.hubs),
    ]
    others = np.random.default_rng(options.seed).permutation(np.unique(gallery.entry_ids)).tolist()
    page = collect_page_images(
        keys.tolist(), required, options.page_images, lambda some: cache.neighbors(some).ids, others
    )
    nearest = _neighbors_on_page(cache, page)
    columns = slice(max(each.max_count for each in (nearest, *(then for _, then in evolution))))
    labels = np.append(gallery.labels, np.full(len(options.files), -1))  # by key
    node_of = np.full(len(labels) + 1, -1)  # by key; -1 stays -1
    node_of[page.keys] = np.arange(len(page.keys))
    explorer = Explorer(
        protocol=inspection.protocol,
        classes=gallery.classes,
        nodes=Nodes(
            ids=np.where(page.keys < images, page.keys, -1),
            names=tuple(_name(gallery, queries, key) for key in page.keys.tolist()),
            labels=labels[page.keys],
            pictures=tuple(cache.thumbnails(page.keys)),
        ),
        graph=Graph(
            neighbors=node_of[nearest.ids[:, columns]],
            similarities=nearest.similarities[:, columns],
            ages=nearest.ages[:, columns] if gallery.searched == "bank" else None,
            complete=page.complete,
        ),
        queries=tuple(node_of[keys].tolist()),
        order=options.selection,
        statistics=replace(
            statistics, hubs=tuple(replace(hub, node=int(node_of[hub.node])) for hub in statistics.hubs)
        ),
        evolution=tuple(
            Moment(
                step=when.step,
                epoch=when.epoch,
                neighbors=node_of[then.ids[:, columns]],
                similarities=then.similarities[:, columns],
                purity=compare_labels(labels[keys], then.ids, gallery.labels).purity(),
            )
            for when, then in evolution
        ),
        clusters=tuple(
            replace(cluster, members=tuple(node_of[list(cluster.members)].tolist())) for cluster in clusters
        ),
        map=_map(cache, page, len(keys), options, notify),
    )
    return BuiltPage(inspection, explorer)


def _sample(gallery: Gallery, options: PageOptions, notify: Notify) -> tuple[ImageCache, Queries, Statistics]:
    """Search the neighbours of a sample of images; choose the queries."""
    queries = choose_queries(gallery, options)  # before the long work, so that errors are found at once
    images = len(gallery.source)
    notify(
        f"embedding and searching {min(options.sample, images):,} random images for the statistics"
        if options.searched == "bank"
        else f"embedding {images:,} images, and searching the neighbours of each"
    )
    cache = ImageCache(gallery, min(options.k, images), len(options.files))
    sample = cache.sample(options.sample, options.seed)
    neighbors = cache.neighbors(sample)
    if queries is None:
        queries = embed_queries(gallery, (), worst_first(gallery, sample, neighbors)[: options.queries])
    return cache, queries, compute_statistics(gallery, sample, neighbors)


def _search_at(gallery: Gallery, checkpoint: Checkpoint, queries: Queries, k: int, notify: Notify) -> ImageNeighbors:
    """The neighbours of the queries at another checkpoint."""
    notify(f"searching at step {checkpoint.step:,}")
    then = gallery.at(checkpoint)
    return search_images(then.bank, then.embed_views(queries.views), queries.ids, k)


def _clusters(gallery: Gallery, options: PageOptions, notify: Notify) -> tuple[Cluster, ...]:
    if not options.clusters:
        return ()
    notify(f"computing {options.clusters} clusters")
    return find_clusters(
        *newest_entries(gallery), gallery.labels, gallery.classes, clusters=options.clusters, seed=options.seed
    )


def _neighbors_on_page(cache: ImageCache, page: PageImages) -> ImageNeighbors:
    """The neighbours of each image of the page; of incomplete ones, the neighbours among the page's images."""
    neighbors = cache.neighbors(page.keys)
    if page.complete.all():
        return neighbors
    among = cache.neighbors_among(page.keys[~page.complete], page.keys)
    row = np.arange(len(page.keys))  # of each image in the concatenation
    row[~page.complete] = len(row) + np.arange(len(among.ids))
    return ImageNeighbors.concatenate([neighbors, among]).take(row)


def _name(gallery: Gallery, queries: Queries, key: int) -> str:
    images = len(gallery.source)
    return printable(gallery.source.name(key)) if key < images else queries.names[key - images]


def _map(
    cache: ImageCache, page: PageImages, queries: int, options: PageOptions, notify: Notify
) -> EmbeddingMap | None:
    """A map of the queries, which are the first images of the page, and of random other images."""
    if options.map_method is None:
        return None
    from msf_faiss.neighbors.embedding_map import draw_map  # scikit-learn takes seconds to import

    others = queries + np.random.default_rng(options.seed).permutation(len(page.keys) - queries)
    nodes: NDArray[np.int64] = np.append(np.arange(queries), np.sort(others[: max(0, _MAX_POINTS - queries)]))  # [M]
    notify(f"drawing a map of {len(nodes):,} images")
    positions, note = draw_map(cache.embeddings(page.keys[nodes]).cpu().numpy(), options.map_method, options.seed)
    return EmbeddingMap(method=options.map_method, nodes=nodes, positions=positions, note=note)
