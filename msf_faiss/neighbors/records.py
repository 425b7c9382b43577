"""What an inspection found, as plain values; the thumbnails lie apart, so that the records stay light."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from msf_faiss.errors import UserError
from msf_faiss.files import write_atomic

Searched = Literal["bank", "dataset"]
"""A checkpoint's bank, or the training set, embedded anew."""

Selection = Literal["random", "chosen", "worst"]
"""How queries were found; worst: the lowest purity among many, first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighborRecord:
    """An image that a query retrieved, by its most similar entry."""

    rank: int  # from 1
    id: int  # in the training set
    name: str
    similarity: float  # cosine
    age: int | None  # entries pushed into the bank since; None: the data set was searched
    label: int | None
    class_name: str | None
    matches: bool | None  # has the query's label; None: one of the two has none


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnEntry:
    """The most similar of the entries of the query's own image."""

    similarity: float  # cosine
    age: int | None
    entries: int  # how many entries the image has


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRecord:
    """A query and the images that it retrieved, its own left out, the most similar first."""

    id: int | None  # in the training set; None: a file
    name: str
    label: int | None
    class_name: str | None
    own: OwnEntry | None  # None: no entry is of this image
    neighbors: tuple[NeighborRecord, ...]

    @property
    def matching(self) -> int:
        """How many neighbours have the query's label."""
        return sum(neighbor.matches is True for neighbor in self.neighbors)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionProtocol:
    """How the records came about."""

    checkpoint: str
    run: str | None  # None: the checkpoint lies outside a run
    step: int
    epoch: float
    searched: Searched
    entries: int  # searched
    capacity: int | None  # of the bank; None: the data set was searched
    dtype: str  # of the entries
    encoder: Literal["target"]  # it embedded the queries, and the data set if that was searched
    view: str  # of the queries, and of the data set if that was searched
    k: int  # neighbours asked for
    selection: Selection  # of the queries
    seed: int | None  # of the random choice
    data: dict[str, Any]  # config of the training set
    dataset_size: int
    version: str  # of msf_faiss

    @property
    def name(self) -> str:
        """What to call the run, in short."""
        path = Path(self.run or self.checkpoint)
        return path.name or path.resolve().name


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Means over all queries; each is None where there was nothing to take it over."""

    queries: int
    purity: float | None  # share of neighbours with their query's label, its own image left out
    chance: float | None  # purity of neighbours drawn at random among the entries of other images
    purity_by_rank: tuple[float | None, ...]
    similarity: float | None
    similarity_by_rank: tuple[float | None, ...]
    age: float | None  # entries pushed since


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnails:
    """Square pictures of what the encoder saw: its centre view, made smaller where that is large."""

    side: int  # height and width in pixels
    queries: tuple[Image.Image, ...]  # RGB, in the order of the queries
    images: Mapping[int, Image.Image]  # RGB, of every neighbour, by id

    @property
    def small(self) -> bool:
        """Whether they are shown enlarged, pixel by pixel."""
        return self.side <= 64

    def shown(self, about: int) -> int:
        """Side at which to show them, near `about`: a whole multiple of small ones, so that all pixels are equal."""
        return self.side * max(1, round(about / self.side)) if self.small else about


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Queries, what they retrieved, and how."""

    protocol: InspectionProtocol
    summary: Summary
    queries: tuple[QueryRecord, ...]
    thumbnails: Thumbnails | None

    @property
    def short_of(self) -> int:
        """Neighbours that the poorest query lacks of the k asked for, there being no more other images."""
        return self.protocol.k - min(len(query.neighbors) for query in self.queries)


def summarize(queries: Sequence[QueryRecord], chances: Sequence[float | None]) -> Summary:
    """Means over `queries`; `chances` holds for each the share of other entries that have its label."""
    found = [neighbor for query in queries for neighbor in query.neighbors]
    ranks = range(1, max((len(query.neighbors) for query in queries), default=0) + 1)
    by_rank = [[neighbor for neighbor in found if neighbor.rank == rank] for rank in ranks]
    return Summary(
        queries=len(queries),
        purity=_purity(found),
        chance=_mean([chance for chance in chances if chance is not None]),
        purity_by_rank=tuple(map(_purity, by_rank)),
        similarity=_mean([neighbor.similarity for neighbor in found]),
        similarity_by_rank=tuple(_mean([neighbor.similarity for neighbor in rank]) for rank in by_rank),
        age=_mean([neighbor.age for neighbor in found if neighbor.age is not None]),
    )


def write_records(inspection: Inspection, path: Path) -> None:
    """Everything but the thumbnails as JSON: an object of `protocol`, `summary` and `queries`.

    Raises:
        UserError: if the file cannot be written.
    """
    records = {
        "protocol": asdict(inspection.protocol),
        "summary": asdict(inspection.summary),
        "queries": [asdict(query) for query in inspection.queries],
    }
    write_output(path, json.dumps(records, indent=2, allow_nan=False) + "\n")


def write_output(path: Path, content: bytes | str) -> None:
    """Write what the user asked for.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; choose another --out") from error


def _purity(neighbors: Sequence[NeighborRecord]) -> float | None:
    return _mean([float(neighbor.matches) for neighbor in neighbors if neighbor.matches is not None])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
