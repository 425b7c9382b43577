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
from msf_faiss.neighbors.inspection import make_inspection, search_sample
from msf_faiss.neighbors.options import PageOptions
from msf_faiss.neighbors.page_content import Cluster, EmbeddingMap, Explorer, Graph, Moment, Nodes
from msf_faiss.neighbors.page_images import PageImages, collect_page_images
from msf_faiss.neighbors.queries import Queries
from msf_faiss.neighbors.records import Inspection
from msf_faiss.neighbors.review import find_outliers, near_duplicates
from msf_faiss.neighbors.statistics import Matches, compare_labels, compute_statistics
from msf_faiss.text import printable

_MAX_POINTS = 3000  # of the map

_Notify = Callable[[str], object]


class _Moment(NamedTuple):
    """A checkpoint of the evolution."""

    checkpoint: Checkpoint
    neighbors: ImageNeighbors  # of the queries
    sample: Matches  # of the neighbours of random images

    def on_page(self, node_of: NDArray[np.int64], columns: slice) -> Moment:
        return Moment(
            step=self.checkpoint.step,
            epoch=self.checkpoint.epoch,
            neighbors=node_of[self.neighbors.ids[:, columns]],
            similarities=self.neighbors.similarities[:, columns],
            images=len(self.sample.same),
            purity=self.sample.purity(),
            purity_interval=self.sample.purity_interval(),
        )


class BuiltPage(NamedTuple):
    """The inspection of the queries, and the content of the page around them."""

    inspection: Inspection  # without thumbnails
    explorer: Explorer


def build_page(checkpoint: Checkpoint, options: PageOptions, notify: _Notify = lambda line: None) -> BuiltPage:
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
    cache, queries, sample, found = search_sample(gallery, options, notify)
    statistics = compute_statistics(gallery, sample, found)
    images, k = len(gallery.source), min(options.k, len(gallery.source))
    neighbors = search_images(gallery.bank, queries.embeddings, queries.ids, k)
    inspection = make_inspection(gallery, queries, neighbors, statistics.summary, options, thumbnails=False)
    keys = np.where(queries.ids < 0, images + np.arange(len(queries.ids)), queries.ids)  # [Q], see `image_cache`
    cache.add(keys, queries.embeddings, map(thumbnail, queries.views), neighbors)
    evolution = [_search_at(gallery, each, queries, options, notify) for each in earlier]
    matches = compare_labels(gallery.labels[sample], found.ids, gallery.labels)
    evolution += [_Moment(checkpoint, neighbors, matches)] if earlier else []
    clusters, cluster_of = _clusters(gallery, options, notify)
    pairs, outliers = near_duplicates(sample, found, cache.embeddings), find_outliers(sample, found)

    notify("collecting neighbours of neighbours")
    required = [
        *(other for then in evolution for other in then.neighbors.ids.ravel().tolist() if other >= 0),
        *(member for cluster in clusters for member in cluster.members),
        *(hub.node for hub in statistics.hubs),
        *(key for pair in pairs for key in pair[:2]),
        *(key for key, _ in outliers),
    ]
    others = np.random.default_rng(options.seed).permutation(np.unique(gallery.entry_ids)).tolist()
    page = collect_page_images(
        keys.tolist(), required, options.page_images, lambda some: cache.neighbors(some).ids, others
    )
    nearest = _neighbors_on_page(cache, page)
    columns = slice(max(each.max_count for each in (nearest, *(then.neighbors for then in evolution))))
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
        evolution=tuple(then.on_page(node_of, columns) for then in evolution),
        clusters=tuple(
            replace(cluster, members=tuple(node_of[list(cluster.members)].tolist())) for cluster in clusters
        ),
        cluster_of=cluster_of[page.keys] if clusters else None,
        pairs=tuple((int(node_of[one]), int(node_of[two]), cosine) for one, two, cosine in pairs),
        outliers=tuple((int(node_of[key]), mean) for key, mean in outliers),
        map=_map(cache, page, len(keys), options, notify),
    )
    return BuiltPage(inspection, explorer)


def _search_at(
    gallery: Gallery, checkpoint: Checkpoint, queries: Queries, options: PageOptions, notify: _Notify
) -> _Moment:
    """The neighbours of the queries, and of the same random images, at another checkpoint."""
    notify(f"searching at step {checkpoint.step:,}")
    then, k = gallery.at(checkpoint), min(options.k, len(gallery.source))
    neighbors = search_images(then.bank, then.embed_views(queries.views), queries.ids, k)
    cache = ImageCache(then, k)
    sample = cache.sample(options.sample if gallery.labels.max() >= 0 else 1, options.seed)
    return _Moment(
        checkpoint, neighbors, compare_labels(gallery.labels[sample], cache.neighbors(sample).ids, gallery.labels)
    )


def _clusters(gallery: Gallery, options: PageOptions, notify: _Notify) -> tuple[tuple[Cluster, ...], NDArray[np.int64]]:
    """The clusters, and the index of each training image's cluster, -1 for none: [N + files]."""
    cluster_of = np.full(len(gallery.source) + len(options.files), -1)
    if not options.clusters:
        return (), cluster_of
    notify(f"computing {options.clusters} clusters")
    ids, embeddings = newest_entries(gallery)
    clusters, cluster_of[ids] = find_clusters(
        ids, embeddings, gallery.labels, gallery.classes, clusters=options.clusters, seed=options.seed
    )
    return clusters, cluster_of


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
    cache: ImageCache, page: PageImages, queries: int, options: PageOptions, notify: _Notify
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
