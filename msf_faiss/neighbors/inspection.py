"""From a checkpoint to the neighbours that some queries retrieve.

Shapes: Q queries, n filled slots, K neighbours, D dimensions, S pixels of a view's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import msf_faiss
from msf_faiss.bank import Bank
from msf_faiss.checkpoint.format import Checkpoint
from msf_faiss.data.readable import decode_readable
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.data.sources.decode import decode_file
from msf_faiss.device import CPU
from msf_faiss.errors import UserError
from msf_faiss.neighbors.gallery import Gallery, open_gallery, thumbnail
from msf_faiss.neighbors.lookup import Lookup
from msf_faiss.neighbors.records import (
    Inspection,
    InspectionProtocol,
    NeighborRecord,
    OwnEntry,
    QueryRecord,
    Searched,
    Selection,
    Summary,
    Thumbnails,
    summarize,
)
from msf_faiss.neighbors.retrieval import search_images
from msf_faiss.neighbors.statistics import worst_first
from msf_faiss.text import printable
from msf_faiss.views.random_view import center_crop

_DECODED = 16  # images decoded at a time: photographs may have 50 MB each


class Found(NamedTuple):
    """An entry that answers a query."""

    id: int
    similarity: float
    age: int


class Answer(NamedTuple):
    """What one query retrieved."""

    own: OwnEntry | None
    others: list[Found]  # at most K different images, the most similar first


class Queries(NamedTuple):
    """Images to ask for."""

    ids: list[int | None]  # None: a file
    names: list[str]
    crops: Tensor  # [Q, 3, S, S] uint8 centre views
    embeddings: Tensor  # [Q, D] unit norm


def inspect(
    checkpoint: Checkpoint,
    *,
    queries: int = 12,
    files: Sequence[Path] = (),
    ids: Sequence[int] = (),
    worst: bool = False,
    k: int = 10,
    searched: Searched = "bank",
    sample: int = 2000,
    overrides: Sequence[str] = (),
    seed: int = 0,
    device: torch.device = CPU,
    thumbnails: bool = True,
) -> Inspection:
    """The neighbours that queries retrieve from a checkpoint's bank, or from the whole training set.

    Queries are embedded by the target encoder in eval mode under the centre view. The query's own image is left out of
    its neighbours, and an image that has several entries is shown once.

    Args:
        checkpoint: gives the encoder and the bank.
        queries: how many training images to choose at random, as many of each class as there can be; all if there are
            fewer. Not used if `files` or `ids` name the queries.
        files: image files that are queries.
        ids: training images that are queries.
        worst: rather than random images take those of the lowest purity, see `statistics.worst_first`.
        k: neighbours of each query; fewer where there are no more other images.
        searched: "bank", or "dataset": every training image, embedded as the queries are.
        sample: random images among which to look for the worst; all, if the data set is searched.
        overrides: `data.key=value` or `views.key=value` changes to the checkpoint's config.
        seed: of the random choices.
        device: where to embed and search.
        thumbnails: False leaves the pictures out, for records alone.

    Raises:
        UserError: if a query does not exist or is no image, the bank is empty or belongs to other data, the data or
            the checkpoint cannot be read; if the worst are asked for and nothing has labels.
        ValueError: if queries or k is below 1.
    """
    if queries < 1 or k < 1:
        raise ValueError(f"queries and k must be at least 1, found {queries} and {k}")
    gallery = open_gallery(checkpoint, searched=searched, overrides=overrides, device=device)
    selection = selection_of(files, ids, worst=worst)
    if selection == "worst":
        refuse_unlabelled(gallery)
        lookup = Lookup(gallery, min(k, len(gallery.source)))
        asked = lookup.sample(sample, seed)
        ids = worst_first(gallery, asked, lookup.neighbors(asked))[:queries]
    elif selection == "random":
        ids = balanced_choice(gallery.source, queries, seed)
    return inspection_of(gallery, embed_queries(gallery, files, ids), k, selection, seed, thumbnails=thumbnails)


def selection_of(files: Sequence[Path], ids: Sequence[int], *, worst: bool) -> Selection:
    """How the queries are found; named ones go before."""
    if files or ids:
        return "chosen"
    return "worst" if worst else "random"


def inspection_of(
    gallery: Gallery,
    queries: Queries,
    k: int,
    selection: Selection,
    seed: int,
    *,
    thumbnails: bool,
) -> Inspection:
    """What some queries retrieve; the pictures of all of it, if they are wanted. See `inspect`."""
    checkpoint, config, source = gallery.checkpoint, gallery.config, gallery.source
    bank, aged = gallery.bank, gallery.searched == "bank"
    answers = retrieve(bank, queries.embeddings, [-1 if index is None else index for index in queries.ids], k)
    records = [
        _record(source, index, name, answer, aged=aged)
        for index, name, answer in zip(queries.ids, queries.names, answers, strict=True)
    ]
    protocol = InspectionProtocol(
        checkpoint=printable(checkpoint.path),
        run=None if checkpoint.run_dir is None else printable(checkpoint.run_dir),
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        searched=gallery.searched,
        entries=len(bank),
        capacity=bank.capacity if aged else None,
        dtype=str(bank.dtype).removeprefix("torch."),
        encoder="target",
        view=f"shorter side {config.views.resize} px, centre {config.views.size} px",
        k=k,
        selection=selection,
        seed=None if selection == "chosen" else seed,
        data=config.data.model_dump(mode="json"),
        dataset_size=len(source),
        version=msf_faiss.__version__,
    )
    return Inspection(
        protocol=protocol,
        summary=_summary(gallery, records),
        queries=tuple(records),
        thumbnails=_thumbnails(gallery, records, queries) if thumbnails else None,
    )


def refuse_unlabelled(gallery: Gallery) -> None:
    """Raise a UserError if no image has a label, before much is computed."""
    if gallery.labels.max() < 0:
        raise UserError("the data have no labels, so that no query is worse than another; leave --worst out")


def balanced_choice(source: Source, count: int, seed: int) -> list[int]:
    """Ids of `count` random images in the order of class and id; class sizes differ by at most one while they can.

    Images without a label are chosen only where none has one.
    """
    shuffled = np.random.default_rng(seed).permutation(len(source))
    labels = source.labels
    if labels is None or labels.max() < 0:
        return sorted(shuffled[:count].tolist())
    shuffled = shuffled[labels[shuffled] >= 0]
    by_class = np.argsort(labels[shuffled], kind="stable")
    _, starts, sizes = np.unique(labels[shuffled][by_class], return_index=True, return_counts=True)
    turn = np.empty_like(by_class)  # how many of the same class come before
    turn[by_class] = np.arange(len(by_class)) - np.repeat(starts, sizes)
    chosen = shuffled[np.argsort(turn, kind="stable")[:count]]
    return sorted(chosen.tolist(), key=lambda index: (int(labels[index]), index))


def retrieve(bank: Bank, queries: Tensor, query_ids: Sequence[int], k: int) -> list[Answer]:
    """For each of `queries` [Q, D] (unit norm) its own entry, and the `k` most similar entries of other images.

    Args:
        bank: searched; not empty.
        queries: on the bank's device.
        query_ids: the images that the queries are, -1 for one that the bank cannot know.
        k: neighbours, each of another image, which counts by its most similar entry.
    """
    slots = torch.arange(len(bank), device=bank.device)  # [n]
    ids = bank.ids(slots)  # [n]
    found = search_images(bank, queries, np.array(query_ids, np.int64), min(k, len(bank)))
    columns = (values.tolist() for values in found)
    return [
        Answer(
            _own_entry(bank, query, slots[ids == query_id]),
            [entry for entry in map(Found, *row) if entry.id >= 0],
        )
        for query, query_id, row in zip(queries, query_ids, zip(*columns, strict=True), strict=True)
    ]


def _own_entry(bank: Bank, query: Tensor, slots: Tensor) -> OwnEntry | None:
    """The best of the query's own entries, which may rank below all that was fetched."""
    if len(slots) == 0:
        return None
    similarities = bank.reconstruct(slots).double() @ query.to(bank.dtype).double()
    best = int(similarities.argmax())
    return OwnEntry(similarity=float(similarities[best].float()), age=int(bank.age(slots[best])), entries=len(slots))


def embed_queries(gallery: Gallery, files: Sequence[Path], ids: Sequence[int]) -> Queries:
    """The files, then the training images; with `unreadable: skip`, those that can be read.

    Raises:
        UserError: if one of them does not exist or is no image, or none can be read.
    """
    source, config = gallery.source, gallery.config
    wrong = [index for index in ids if not 0 <= index < len(source)]
    if wrong:
        raise UserError(f"there is no training image {wrong[0]}; the data hold {len(source):,}, counted from 0")
    crops = [center_crop([_decode_query(path)], config.views) for path in files]  # [B, 3, S, S] uint8 each
    readable: list[int] = []
    unreadable: list[str] = []
    for part in _parts(ids):
        decoded = decode_readable(source, np.array(part, np.int64), config.data)
        readable += decoded.ids.tolist()
        unreadable += decoded.unreadable.values()
        crops.append(center_crop(decoded.images, config.views))
    every = torch.cat(crops)  # [Q, 3, S, S]
    if len(every) == 0:
        raise UserError(f"none of the queries can be read: {unreadable[0]}")
    return Queries(
        ids=[None] * len(files) + readable,
        names=[printable(path) for path in files] + [printable(source.name(index)) for index in readable],
        crops=every,
        embeddings=gallery.embed_views(every),
    )


def _parts(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    return (ids[start : start + _DECODED] for start in range(0, len(ids), _DECODED))


def _decode_query(path: Path) -> Tensor:
    """uint8 [3, H, W]."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{printable(path)} {found}; a query is an image file")
    try:
        return decode_file(path, lambda: printable(path))
    except UnreadableImageError as error:
        raise UserError(
            f"{printable(path)} cannot be read as an image; a query is an image file, as JPEG or PNG"
        ) from error


def _record(source: Source, index: int | None, name: str, answer: Answer, *, aged: bool) -> QueryRecord:
    label, class_name = (None, None) if index is None else _label(source, index)
    neighbors = []
    for rank, found in enumerate(answer.others, start=1):
        their_label, their_class = _label(source, found.id)
        neighbors.append(
            NeighborRecord(
                rank=rank,
                id=found.id,
                name=printable(source.name(found.id)),
                similarity=found.similarity,
                age=found.age if aged else None,
                label=their_label,
                class_name=their_class,
                matches=None if label is None or their_label is None else label == their_label,
            )
        )
    own = answer.own
    if own is not None and not aged:
        own = OwnEntry(similarity=own.similarity, age=None, entries=own.entries)
    return QueryRecord(id=index, name=name, label=label, class_name=class_name, own=own, neighbors=tuple(neighbors))


def _label(source: Source, index: int) -> tuple[int, str] | tuple[None, None]:
    if source.labels is None or source.classes is None or source.labels[index] < 0:
        return None, None
    label = int(source.labels[index])
    return label, printable(source.classes[label])


def _summary(gallery: Gallery, records: Sequence[QueryRecord]) -> Summary:
    chances: list[float | None] = [None] * len(records)
    ids, labels = gallery.entry_ids, gallery.labels[gallery.entry_ids]  # [n]
    for place, query in enumerate(records):
        others = labels[(labels >= 0) & (ids != (-1 if query.id is None else query.id))]
        if query.label is not None and len(others):
            chances[place] = float((others == query.label).mean())
    return summarize(records, chances)


def _thumbnails(gallery: Gallery, records: Sequence[QueryRecord], queries: Queries) -> Thumbnails:
    ids = sorted({neighbor.id for query in records for neighbor in query.neighbors})
    images: dict[int, Image.Image] = {}
    for part in _parts(ids):
        crops = center_crop([gallery.source.decode(index) for index in part], gallery.config.views)
        images |= zip(part, map(thumbnail, crops), strict=True)
    asked = tuple(map(thumbnail, queries.crops))
    return Thumbnails(side=asked[0].width, queries=asked, images=images)
