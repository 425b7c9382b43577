"""Inspect the neighbours that queries retrieve from a checkpoint's bank, or from its training set.

Shapes: A random images, Q queries, K neighbours.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import msf_faiss
from msf_faiss.checkpoint.format import Checkpoint
from msf_faiss.data.source import Source
from msf_faiss.neighbors.gallery import Gallery, open_gallery, thumbnail
from msf_faiss.neighbors.image_cache import ImageCache
from msf_faiss.neighbors.image_search import ImageNeighbors, search_images
from msf_faiss.neighbors.options import InspectOptions
from msf_faiss.neighbors.queries import Queries, choose_queries, decode_batches, embed_queries
from msf_faiss.neighbors.records import (
    Inspection,
    InspectionProtocol,
    NeighborRecord,
    OwnEntry,
    QueryRecord,
    Summary,
    Thumbnails,
)
from msf_faiss.neighbors.statistics import compute_summary, worst_first
from msf_faiss.text import printable
from msf_faiss.views.random_view import center_crop


class _Sample(NamedTuple):
    """Random images and their neighbours, and the queries."""

    cache: ImageCache
    queries: Queries
    ids: NDArray[np.int64]  # [A]
    neighbors: ImageNeighbors  # of the random images, [A, K]


def inspect(
    checkpoint: Checkpoint,
    options: InspectOptions,
    *,
    thumbnails: bool = True,
    notify: Callable[[str], object] = lambda line: None,
) -> Inspection:
    """Retrieve the neighbours of queries; summarize those of random images, since a few queries say little.

    The target encoder embeds centre views of the queries, in eval mode. A query's own image is not among its
    neighbours, and an image with several entries counts once, by its most similar one.

    Args:
        checkpoint: gives the encoder and the bank.
        options: queries, and what to search.
        thumbnails: include thumbnails.
        notify: called with a line on what happens next.

    Raises:
        UserError: if a query does not exist or is unreadable, the bank is empty or refers to other data, the data or
            the checkpoint cannot be read, or the worst queries are wanted of unlabelled images.
    """
    gallery = open_gallery(checkpoint, searched=options.searched, overrides=options.overrides, device=options.device)
    sample = search_sample(gallery, options, notify)
    summary = compute_summary(gallery, sample.ids, sample.neighbors)
    queries = sample.queries
    neighbors = search_images(gallery.bank, queries.embeddings, queries.ids, min(options.k, len(gallery.source)))
    return make_inspection(gallery, queries, neighbors, summary, options, thumbnails=thumbnails)


def search_sample(gallery: Gallery, options: InspectOptions, notify: Callable[[str], object]) -> _Sample:
    """Search the neighbours of random images; choose the queries.

    Raises:
        UserError: as `inspect`.
    """
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
    return _Sample(cache, queries, sample, neighbors)


def make_inspection(
    gallery: Gallery,
    queries: Queries,
    neighbors: ImageNeighbors,
    summary: Summary,
    options: InspectOptions,
    *,
    thumbnails: bool,
) -> Inspection:
    """Records of queries and their neighbours."""
    checkpoint, config, bank = gallery.checkpoint, gallery.config, gallery.bank
    records = [_query_record(gallery, queries, row, neighbors) for row in range(len(queries.ids))]
    protocol = InspectionProtocol(
        checkpoint=printable(checkpoint.path),
        run=None if checkpoint.run_dir is None else printable(checkpoint.run_dir),
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        searched=gallery.searched,
        entries=len(bank),
        capacity=bank.capacity if gallery.searched == "bank" else None,
        dtype=str(bank.dtype).removeprefix("torch."),
        encoder="target",
        view=f"shorter side {config.views.resize} px, centre {config.views.size} px",
        k=options.k,
        selection=options.selection,
        seed=None if options.selection == "chosen" else options.seed,
        data=config.data.model_dump(mode="json"),
        dataset_size=len(gallery.source),
        version=msf_faiss.__version__,
    )
    return Inspection(
        protocol=protocol,
        summary=summary,
        queries=tuple(records),
        thumbnails=_thumbnails(gallery, records, queries) if thumbnails else None,
    )


def _query_record(gallery: Gallery, queries: Queries, row: int, neighbors: ImageNeighbors) -> QueryRecord:
    source, has_ages = gallery.source, gallery.searched == "bank"
    query_id = int(queries.ids[row])
    label, class_name = (None, None) if query_id < 0 else _label(source, query_id)
    records = []
    columns = zip(*(values[row].tolist() for values in neighbors), strict=True)
    for rank, (index, similarity, age) in enumerate(columns, start=1):
        if index < 0:
            break
        their_label, their_class = _label(source, index)
        records.append(
            NeighborRecord(
                rank=rank,
                id=index,
                name=printable(source.name(index)),
                similarity=similarity,
                age=age if has_ages else None,
                label=their_label,
                class_name=their_class,
                matches=None if label is None or their_label is None else label == their_label,
            )
        )
    return QueryRecord(
        id=None if query_id < 0 else query_id,
        name=queries.names[row],
        label=label,
        class_name=class_name,
        own=_own_entry(gallery, queries, row),
        neighbors=tuple(records),
    )


def _own_entry(gallery: Gallery, queries: Queries, row: int) -> OwnEntry | None:
    """The most similar entry of the query's own image, however low it ranks."""
    bank, slots = gallery.bank, np.flatnonzero(gallery.entry_ids == queries.ids[row])
    if queries.ids[row] < 0 or len(slots) == 0:
        return None
    own = torch.from_numpy(slots).to(bank.device)
    similarities = bank.reconstruct(own).double() @ queries.embeddings[row].to(bank.dtype).double()
    best = int(similarities.argmax())
    return OwnEntry(
        similarity=float(similarities[best].float()),
        age=int(bank.age(own[best])) if gallery.searched == "bank" else None,
        entries=len(slots),
    )


def _label(source: Source, index: int) -> tuple[int, str] | tuple[None, None]:
    if source.labels is None or source.classes is None or source.labels[index] < 0:
        return None, None
    label = int(source.labels[index])
    return label, printable(source.classes[label])


def _thumbnails(gallery: Gallery, records: Sequence[QueryRecord], queries: Queries) -> Thumbnails:
    ids = sorted({neighbor.id for query in records for neighbor in query.neighbors})
    images: dict[int, Image.Image] = {}
    for batch in decode_batches(ids):
        views = center_crop([gallery.source.decode(index) for index in batch], gallery.config.views)
        images |= zip(batch, map(thumbnail, views), strict=True)
    of_queries = tuple(map(thumbnail, queries.views))
    return Thumbnails(side=of_queries[0].width, queries=of_queries, images=images)
