"""Results of an inspection as plain values. Thumbnails are separate from the records, which stay small."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from msf_faiss.errors import UserError
from msf_faiss.files import write_atomic

Searched = Literal["bank", "dataset"]
"""The checkpoint's bank, or the training set, embedded anew."""

Selection = Literal["random", "chosen", "worst"]
"""How queries were selected; worst: those of lowest purity in a sample, in this order."""


Interval = tuple[float, float]
"""Ends of a 95 % interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighborRecord:
    """A neighbour of a query, represented by its most similar entry."""

    rank: int  # from 1
    id: int  # in the training set
    name: str
    similarity: float  # cosine
    age: int | None  # number of entries pushed since; None: the data set was searched
    label: int | None
    class_name: str | None
    matches: bool | None  # has the query's label; None: one of the two is unlabelled


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnEntry:
    """The most similar entry of the query's own image."""

    similarity: float  # cosine
    age: int | None
    entries: int  # number of entries of the image


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryRecord:
    """A query and its neighbours, most similar first, without the query itself."""

    id: int | None  # in the training set; None: a file
    name: str
    label: int | None
    class_name: str | None
    own: OwnEntry | None  # None: the image has no entry
    neighbors: tuple[NeighborRecord, ...]

    @property
    def matching(self) -> int:
        """Number of neighbours with the query's label."""
        return sum(neighbor.matches is True for neighbor in self.neighbors)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionProtocol:
    """How the records were obtained."""

    checkpoint: str
    run: str | None  # None: the checkpoint is not part of a run
    step: int
    epoch: float
    searched: Searched
    entries: int  # of the gallery
    capacity: int | None  # of the bank; None: the data set was searched
    dtype: str  # of the entries
    encoder: Literal["target"]  # embedded the queries, and the data set if that was searched
    view: str  # of the queries, and of the data set if that was searched
    k: int  # requested neighbours
    selection: Selection  # of the queries
    seed: int | None  # of the random choice
    data: dict[str, Any]  # config of the training set
    dataset_size: int
    version: str  # of msf_faiss

    @property
    def name(self) -> str:
        """Short name of the run."""
        path = Path(self.run or self.checkpoint)
        return path.name or path.resolve().name


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Means over the neighbours of many random images, or of all if the data set is searched; None if undefined."""

    images: int
    purity: float | None  # fraction of neighbours with their query's label
    purity_interval: Interval | None
    chance: float | None  # expected purity of random entries of other images
    purity_by_rank: tuple[float | None, ...]
    similarity: float | None
    similarity_by_rank: tuple[float | None, ...]
    age: float | None  # number of entries pushed since


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnails:
    """Centre views of the images, downscaled if they are large; all of the same size."""

    side: int  # height and width in pixels
    queries: tuple[Image.Image, ...]  # RGB, in the order of the queries
    images: Mapping[int, Image.Image]  # RGB, of all neighbours, by id

    @property
    def small(self) -> bool:
        """Whether to enlarge them without interpolation."""
        return self.side <= 64

    def shown(self, about: int) -> int:
        """Side to display them at, close to `about`; an integer multiple of the side of small ones."""
        return self.side * max(1, round(about / self.side)) if self.small else about


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Queries and their neighbours, with the protocol."""

    protocol: InspectionProtocol
    summary: Summary
    queries: tuple[QueryRecord, ...]
    thumbnails: Thumbnails | None

    @property
    def missing_neighbors(self) -> int:
        """How many fewer than k neighbours a query has at least, because there are no other images."""
        return self.protocol.k - min(len(query.neighbors) for query in self.queries)


def write_records(inspection: Inspection, path: Path) -> None:
    """Write an inspection without its thumbnails as JSON: an object of `protocol`, `summary` and `queries`.

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
    """Write a file that the user named with --out.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}; name another file with --out") from error
