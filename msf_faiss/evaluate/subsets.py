"""Choose the training images that keep their labels in a semi-supervised evaluation.

Shapes: N labelled images, n of a subset, C classes that have labelled images.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.counter_rng import hash_counters
from msf_faiss.data.source import Source
from msf_faiss.errors import UserError
from msf_faiss.evaluate.images import labelled_ids
from msf_faiss.text import printable

_SUBSET_STREAM = 5  # of counter_rng; others are in evaluate/images, evaluate/logistic and views
_INTEGER = re.compile(r"[+-]?[0-9]+")
_MAX_DIGITS = 18  # of a 64-bit integer
# Sources over tables and shards name an image by its file, row or shard, and path.
_NAME_IN_FILE = re.compile(r".*, row [0-9]+ \((.+)\)|.*\.tar, (.+)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """Images that keep their labels."""

    ids: Tensor  # [n] int64, ascending
    description: Mapping[str, Any]  # for a protocol: origin and size


def balanced_subset(source: Source, fraction: float, *, seed: int) -> Subset:
    """The same number of images per class: max(1, round(fraction N / C)), or all of a class that has fewer.

    The choice depends only on the seed and the ids. A smaller fraction's subset is part of a larger one's.

    Raises:
        UserError: if no image has a label, or `fraction` is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"the fraction of labels must be above 0 and at most 1, found {fraction:g}; 0.01 means 1 %")
    ids = labelled_ids(source).numpy()
    assert source.labels is not None
    labels = source.labels[ids]
    order = np.lexsort((hash_counters(seed, 0, _SUBSET_STREAM, ids), labels))  # [N] by class, shuffled within
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))  # [C]
    places = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))  # [N] within the class
    per_class = max(1, round(fraction * len(ids) / len(starts)))
    return _subset(source, ids[order[places < per_class]], {"fraction": fraction, "seed": seed})


def listed_subset(source: Source, path: Path) -> Subset:
    """The images in a text file, one per line; blank lines and lines that begin with # are skipped.

    Either all lines are ids, or all are file names or ends of paths (`a.jpg`, `cat/a.jpg`) that match the end of one
    image's `source.name`. SimCLR's lists of 1 % and 10 % of ImageNet (`n01440764_10026.JPEG`) have this form.

    Raises:
        UserError: with the line, if it matches no image, several images, the image of another line, or an unlabelled
            image; if the file cannot be read, is not text or lists nothing; or if no image has a label.
    """
    labelled_ids(source)
    title = printable(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{title}: cannot read the list of images: {error.strerror or error}; name a text file with one image per "
            "line"
        ) from error
    if b"\0" in content:
        raise UserError(f"{title}: not a text file; name one with an image's file name or id per line")
    entries = list(_parse(content))
    if not entries:
        raise UserError(f"{title}: the list is empty; write a file name or an id per line")
    if all(_INTEGER.fullmatch(entry.text) for entry in entries):
        ids = _match_ids(source, entries, title)
    else:
        ids = _match_names(source, entries, title)
    assert source.labels is not None
    lines: dict[int, int] = {}  # by id
    for entry, index in zip(entries, ids, strict=True):
        if index in lines:
            raise UserError(
                f"{title}, line {entry.line}: {_shorten(entry.text)} is the same image as line {lines[index]}; remove "
                "one of them"
            )
        if source.labels[index] < 0:
            raise UserError(
                f"{title}, line {entry.line}: {source.name(index)} has no label; remove the line, or label the image"
            )
        lines[index] = entry.line
    origin = {"file": printable(path.name), "sha256": hashlib.sha256(content).hexdigest()}
    return _subset(source, np.array(ids, np.int64), origin)


class _Entry(NamedTuple):
    line: int  # 1, 2, ...
    text: str


def _parse(content: bytes) -> Iterator[_Entry]:
    # Names may not be valid UTF-8; `printable` gives them the form of `source.name`.
    for number, line in enumerate(os.fsdecode(content.removeprefix(b"\xef\xbb\xbf")).split("\n"), start=1):
        text = printable(line.strip(" \t\r"))
        if text and not text.startswith("#"):
            yield _Entry(number, text)


def _match_ids(source: Source, entries: list[_Entry], title: str) -> list[int]:
    for entry in entries:
        if len(entry.text) > _MAX_DIGITS or not 0 <= int(entry.text) < len(source):
            raise UserError(
                f"{title}, line {entry.line}: there is no image {_shorten(entry.text)}; ids are 0 to {len(source) - 1}"
            )
    return [int(entry.text) for entry in entries]


def _match_names(source: Source, entries: list[_Entry], title: str) -> list[int]:
    """The id of each entry, in one pass over the source: it looks up as many ends of a name as entries have depths."""
    paths = [entry.text.removeprefix("./") for entry in entries]
    matches: dict[str, list[int]] = {path: [] for path in paths}  # at most two each
    depths = sorted({path.count("/") + 1 for path in paths})
    for index in range(len(source)):
        parts = _path_of(source.name(index)).rsplit("/", depths[-1])
        for depth in depths:
            if depth > len(parts):
                break
            ids = matches.get("/".join(parts[-depth:]))
            if ids is not None and len(ids) < 2:
                ids.append(index)
    for entry, path in zip(entries, paths, strict=True):
        ids = matches[path]
        if not ids:
            raise UserError(
                f"{title}, line {entry.line}: no image name ends in {_shorten(entry.text)} (they look like "
                f"{source.name(0)}); correct the line, or choose the data that the list belongs to"
            )
        if len(ids) > 1:
            raise UserError(
                f"{title}, line {entry.line}: {_shorten(entry.text)} matches {source.name(ids[0])} and "
                f"{source.name(ids[1])}; write more of the path"
            )
    return [matches[path][0] for path in paths]


def _path_of(name: str) -> str:
    """The path of an image, without the table or shard that contains it."""
    inner = _NAME_IN_FILE.fullmatch(name) if ", " in name else None
    return name if inner is None else inner[1] or inner[2]


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:97]}...")


def _subset(source: Source, ids: NDArray[np.int64], origin: dict[str, Any]) -> Subset:
    assert source.labels is not None
    counts = np.bincount(source.labels[ids], minlength=int(source.labels.max()) + 1)
    counts = counts[np.unique(source.labels[source.labels >= 0])]  # [C]
    description = {
        **origin,
        "images": len(ids),
        "classes": len(counts),
        "images_per_class": {"least": int(counts.min()), "most": int(counts.max())},
    }
    return Subset(ids=torch.from_numpy(np.sort(ids)), description=description)
