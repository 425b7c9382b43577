"""From a checkpoint to the neighbours that some queries retrieve.

Shapes: Q queries, n filled slots, K neighbours, D dimensions, S pixels of a view's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import msf_faiss
from msf_faiss.bank import Bank, FlatBank
from msf_faiss.checkpoint import Checkpoint
from msf_faiss.config import Config
from msf_faiss.config_file import override_config
from msf_faiss.data.base import Source, UnreadableImageError
from msf_faiss.data.batches import decode_readable
from msf_faiss.data.folder import decode_file
from msf_faiss.data.sources import open_source
from msf_faiss.errors import UserError
from msf_faiss.features import extract
from msf_faiss.models import MeanShift
from msf_faiss.neighbors.records import (
    Inspection,
    InspectionProtocol,
    NeighborRecord,
    OwnEntry,
    QueryRecord,
    Summary,
    Thumbnails,
    summarize,
)
from msf_faiss.restore import load_bank, load_model
from msf_faiss.views import center_crop, normalize

_BATCH = 256  # images embedded or searched at a time
_DECODED = 16  # images decoded at a time: photographs may have 50 MB each
_THUMBNAIL = 192  # largest side of a thumbnail


class Found(NamedTuple):
    """An entry that answers a query."""

    id: int
    similarity: float
    age: int


class Answer(NamedTuple):
    """What one query retrieved."""

    own: OwnEntry | None
    others: list[Found]  # at most K different images, the most similar first


class _Queries(NamedTuple):
    ids: list[int | None]  # None: a file
    names: list[str]
    embeddings: Tensor  # [Q, D] unit norm
    thumbnails: list[Image.Image]


def inspect(
    checkpoint: Checkpoint,
    *,
    queries: int = 12,
    files: Sequence[Path] = (),
    ids: Sequence[int] = (),
    k: int = 10,
    searched: Literal["bank", "dataset"] = "bank",
    overrides: Sequence[str] = (),
    seed: int = 0,
    device: torch.device | None = None,
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
        k: neighbours of each query; fewer where there are no more other images.
        searched: "bank", or "dataset": every training image, embedded as the queries are.
        overrides: `data.key=value` or `views.key=value` changes to the checkpoint's config.
        seed: of the random choice.
        device: where to embed and search; None for the CPU.
        thumbnails: False leaves the pictures out, for records alone.

    Raises:
        UserError: if a query does not exist or is no image, the bank is empty or belongs to other data, the data or
            the checkpoint cannot be read.
        ValueError: if queries or k is below 1.
    """
    if queries < 1 or k < 1:
        raise ValueError(f"queries and k must be at least 1, found {queries} and {k}")
    device = device or torch.device("cpu")
    config = _config(checkpoint, overrides, device)
    source = open_source(config.data, "train")
    assert source is not None, "every config names training data"
    if searched == "bank":
        _refuse_other_data(checkpoint, source)
    model = load_model(checkpoint, device).eval()
    chosen = bool(files or ids)
    some = _some_queries(
        source, model, files, ids if chosen else balanced_choice(source, queries, seed), config, device
    )
    bank = load_bank(checkpoint, device) if searched == "bank" else _embed_all(source, model, config, device)
    if len(bank) == 0:
        raise UserError(
            f"{checkpoint.path}: the bank of step {checkpoint.step} is empty; inspect a later checkpoint, "
            "or search the training images with --source dataset"
        )
    answers = retrieve(bank, some.embeddings, [-1 if index is None else index for index in some.ids], k)
    records = [
        _record(source, index, name, answer, aged=searched == "bank")
        for index, name, answer in zip(some.ids, some.names, answers, strict=True)
    ]
    protocol = InspectionProtocol(
        checkpoint=_text(checkpoint.path),
        run=None if checkpoint.run_dir is None else _text(checkpoint.run_dir),
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        searched=searched,
        entries=len(bank),
        capacity=bank.capacity if searched == "bank" else None,
        dtype=str(bank.dtype).removeprefix("torch."),
        encoder="target",
        view=f"shorter side {config.views.resize} px, centre {config.views.size} px",
        k=k,
        selection="chosen" if chosen else "random",
        seed=None if chosen else seed,
        data=config.data.model_dump(mode="json"),
        dataset_size=len(source),
        version=msf_faiss.__version__,
    )
    return Inspection(
        protocol=protocol,
        summary=_summary(source, bank, records),
        queries=tuple(records),
        thumbnails=_thumbnails(source, records, some.thumbnails, config) if thumbnails else None,
    )


def _config(checkpoint: Checkpoint, overrides: Sequence[str], device: torch.device) -> Config:
    for override in overrides:
        if not override.startswith(("data.", "views.")):
            raise UserError(
                f"--set {override}: encoder and bank are taken as they are saved; only data.… and views.… can be set"
            )
    config = override_config(checkpoint.config, overrides)
    # Batches are pinned for the device of the config, which is the one asked for here.
    return config.model_copy(update={"train": config.train.model_copy(update={"device": device.type})})


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
    # k other images and the query's own have together at most as many entries as the k + 1 images that have most.
    counts = torch.from_numpy(np.unique(ids.cpu().numpy(), return_counts=True)[1])
    fetch = int(counts.topk(min(k + 1, len(counts))).values.sum())
    answers = []
    for start in range(0, len(queries), _BATCH):
        part = queries[start : start + _BATCH]
        found = bank.search(part, fetch)
        columns = (bank.ids(found.slots), found.similarities, bank.age(found.slots))
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for query, query_id, row in zip(part, query_ids[start : start + _BATCH], rows, strict=True):
            others: dict[int, Found] = {}
            for entry in map(Found, *row):
                if entry.id != query_id and len(others) < k:
                    others.setdefault(entry.id, entry)
            answers.append(Answer(_own_entry(bank, query, slots[ids == query_id]), list(others.values())))
    return answers


def _own_entry(bank: Bank, query: Tensor, slots: Tensor) -> OwnEntry | None:
    """The best of the query's own entries, which may rank below all that was fetched."""
    if len(slots) == 0:
        return None
    similarities = bank.reconstruct(slots).double() @ query.to(bank.dtype).double()
    best = int(similarities.argmax())
    return OwnEntry(similarity=float(similarities[best].float()), age=int(bank.age(slots[best])), entries=len(slots))


def _refuse_other_data(checkpoint: Checkpoint, source: Source) -> None:
    if len(source) != checkpoint.dataset_size:
        raise UserError(
            f"{checkpoint.path}: its bank refers to a training set of {checkpoint.dataset_size:,} images by their "
            f"number, but the data now hold {len(source):,}, so that the numbers mean other images; give the data of "
            "the training (--set data.…), or search the present ones with --source dataset"
        )


def _some_queries(
    source: Source, model: MeanShift, files: Sequence[Path], ids: Sequence[int], config: Config, device: torch.device
) -> _Queries:
    """The files, then the training images; with `unreadable: skip`, those that can be read."""
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
    embeddings = [model.embed_target(normalize(part.to(device), config.views)) for part in torch.split(every, _BATCH)]
    return _Queries(
        ids=[None] * len(files) + readable,
        names=[_text(path) for path in files] + [_text(source.name(index)) for index in readable],
        embeddings=torch.cat(embeddings),
        thumbnails=[_thumbnail(crop) for crop in every],
    )


def _parts(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    return (ids[start : start + _DECODED] for start in range(0, len(ids), _DECODED))


def _decode_query(path: Path) -> Tensor:
    """uint8 [3, H, W]."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{_text(path)} {found}; a query is an image file")
    try:
        return decode_file(path, lambda: _text(path))
    except UnreadableImageError as error:
        raise UserError(
            f"{_text(path)} cannot be read as an image; a query is an image file, as JPEG or PNG"
        ) from error


def _embed_all(source: Source, model: MeanShift, config: Config, device: torch.device) -> Bank:
    """Every readable training image in a bank of that size."""
    features = extract(model.target, source, config=config, device=device)
    bank = FlatBank(len(features.ids), features.embeddings.shape[1], device=device)
    bank.push(F.normalize(features.embeddings.to(device), dim=1), features.ids.to(device))
    return bank


def _record(source: Source, index: int | None, name: str, answer: Answer, *, aged: bool) -> QueryRecord:
    label, class_name = (None, None) if index is None else _label(source, index)
    neighbors = []
    for rank, found in enumerate(answer.others, start=1):
        their_label, their_class = _label(source, found.id)
        neighbors.append(
            NeighborRecord(
                rank=rank,
                id=found.id,
                name=_text(source.name(found.id)),
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
    return label, _text(source.classes[label])


def _summary(source: Source, bank: Bank, records: Sequence[QueryRecord]) -> Summary:
    chances: list[float | None] = [None] * len(records)
    if source.labels is not None:
        ids: NDArray[np.int64] = bank.ids(torch.arange(len(bank), device=bank.device)).cpu().numpy()
        labels = source.labels[ids]  # [n]
        for place, query in enumerate(records):
            others = labels[(labels >= 0) & (ids != (-1 if query.id is None else query.id))]
            if query.label is not None and len(others):
                chances[place] = float((others == query.label).mean())
    return summarize(records, chances)


def _thumbnails(
    source: Source, records: Sequence[QueryRecord], queries: Sequence[Image.Image], config: Config
) -> Thumbnails:
    ids = sorted({neighbor.id for query in records for neighbor in query.neighbors})
    images: dict[int, Image.Image] = {}
    for part in _parts(ids):
        images |= zip(part, map(_thumbnail, center_crop(source.decode(part), config.views)), strict=True)
    return Thumbnails(side=queries[0].width, queries=tuple(queries), images=images)


def _thumbnail(crop: Tensor) -> Image.Image:
    image = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
    side = min(image.width, _THUMBNAIL)
    return image if side == image.width else image.resize((side, side), Image.Resampling.LANCZOS)


def _text(name: str | Path) -> str:
    """A name that need not be valid UTF-8, as text that any file takes."""
    return str(name).encode(errors="backslashreplace").decode()
