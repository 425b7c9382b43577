"""Which training images keep their labels in a semi-supervised evaluation.

Shapes: N labelled images, n of a subset, C classes that have labelled images.
"""

from __future__ import annotations

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
from msf_faiss.evaluate.inputs import labelled_ids
from msf_faiss.text import printable

_SUBSET = 5  # this module's stream of random numbers; others are in evaluate/inputs, evaluate/logistic, views
_INTEGER = re.compile(r"[+-]?[0-9]+")
_MOST_DIGITS = 18  # of a number that fits into 64 bits
# What sources over tables and shards put before the path that an image has in them.
_WITHIN = re.compile(r".*, row [0-9]+ \((.+)\)|.*\.tar, (.+)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """Images that keep their labels."""

    ids: Tensor  # [n] int64, rising
    description: Mapping[
        str, Any
    ]  # for a protocol: where it comes from, how many images, of each class at least and most


def balanced_subset(source: Source, fraction: float, *, seed: int) -> Subset:
    """As many images of each class: max(1, round(fraction N / C)), or all that a class has if these are fewer.

    Which ones follows from the seed and the ids alone. A smaller fraction's images are among those of a larger one.

    Raises:
        UserError: if no image has a label, or `fraction` is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"a fraction of the labels must be above 0 and at most 1, found {fraction:g}; 0.01 means 1 %")
    ids = labelled_ids(source).numpy()
    assert source.labels is not None
    labels = source.labels[ids]
    order = np.lexsort((hash_counters(seed, 0, _SUBSET, ids), labels))  # [N] class by class, in random order
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))  # [C]
    places = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))  # [N] within the class
    each = max(1, round(fraction * len(ids) / len(starts)))
    return _subset(source, ids[order[places < each]], {"fraction": fraction, "seed": seed})


def listed_subset(source: Source, path: Path) -> Subset:
    """The images that a text file lists, one a line; blank lines and those that begin with # are skipped.

    Either every line is an integer, an id; or each is a file name or the last parts of a path (`a.jpg`, `cat/a.jpg`),
    and means the one image whose `source.name` ends in it, from a / on. The lists of SimCLR for 1 % and 10 % of
    ImageNet (`n01440764_10026.JPEG`) are of that kind.

    Raises:
        UserError: naming the line, if it means no image, several ones, one that another line means, or one without a
            label; if the file cannot be read, is no text or lists nothing; or if no image has a label.
    """
    labelled_ids(source)
    title = printable(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{title}: cannot read this list of images: {error.strerror or error}; name a text file, an image a line"
        ) from error
    if b"\0" in content:
        raise UserError(f"{title}: this is no text; name a text file with the name of an image (or its id) a line")
    entries = list(_entries(content))
    if not entries:
        raise UserError(f"{title}: lists no images; give it a line for each one, a file name or an id")
    if all(_INTEGER.fullmatch(entry.text) for entry in entries):
        found = _by_id(source, entries, title)
    else:
        found = _by_name(source, entries, title)
    assert source.labels is not None
    first: dict[int, int] = {}
    for entry, index in zip(entries, found, strict=True):
        if index in first:
            raise UserError(
                f"{title}, line {entry.line}: {_shown(entry.text)} is the image of line {first[index]}; remove either"
            )
        if source.labels[index] < 0:
            raise UserError(
                f"{title}, line {entry.line}: {source.name(index)} has no label; remove the line, or label the image"
            )
        first[index] = entry.line
    origin = {"file": printable(path.name), "sha256": hashlib.sha256(content).hexdigest()}
    return _subset(source, np.array(found, np.int64), origin)


class _Entry(NamedTuple):
    line: int  # 1, 2, ...
    text: str


def _entries(content: bytes) -> Iterator[_Entry]:
    # Names need not be valid UTF-8; `printable` brings them into the form that sources give theirs.
    for number, line in enumerate(os.fsdecode(content.removeprefix(b"\xef\xbb\xbf")).split("\n"), start=1):
        text = printable(line.strip(" \t\r"))
        if text and not text.startswith("#"):
            yield _Entry(number, text)


def _by_id(source: Source, entries: list[_Entry], title: str) -> list[int]:
    for entry in entries:
        if len(entry.text) > _MOST_DIGITS or not 0 <= int(entry.text) < len(source):
            raise UserError(
                f"{title}, line {entry.line}: there is no image {_shown(entry.text)}; ids are 0 to {len(source) - 1}"
            )
    return [int(entry.text) for entry in entries]


def _by_name(source: Source, entries: list[_Entry], title: str) -> list[int]:
    """The id of each entry. Every image's name is looked at once, and of it as many endings as entries have depths."""
    wanted = [entry.text.removeprefix("./") for entry in entries]
    found: dict[str, list[int]] = {text: [] for text in wanted}
    depths = sorted({text.count("/") + 1 for text in wanted})
    for index in range(len(source)):
        parts = _path_of(source.name(index)).rsplit("/", depths[-1])
        for depth in depths:
            if depth > len(parts):
                break
            matches = found.get("/".join(parts[-depth:]))
            if matches is not None and len(matches) < 2:
                matches.append(index)
    for entry, text in zip(entries, wanted, strict=True):
        matches = found[text]
        if not matches:
            raise UserError(
                f"{title}, line {entry.line}: no image's name ends in {_shown(entry.text)} (one is {source.name(0)}); "
                "correct the line, or choose the data that the list belongs to"
            )
        if len(matches) > 1:
            raise UserError(
                f"{title}, line {entry.line}: {_shown(entry.text)} may mean {source.name(matches[0])} or "
                f"{source.name(matches[1])}; write more of the path"
            )
    return [found[text][0] for text in wanted]


def _path_of(name: str) -> str:
    """An image's path, without the table or shard that it lies in."""
    within = _WITHIN.fullmatch(name) if ", " in name else None
    return name if within is None else within[1] or within[2]


def _shown(text: str) -> str:
    """An entry, shortened, for an error."""
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
