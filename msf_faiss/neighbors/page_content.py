"""The content of a page of neighbours: images, the graph of their neighbours, statistics, evolution, map. No torch.

Shapes: P images of the page (its nodes), Q queries, K neighbours of each, M points of a map, n bins of a histogram.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msf_faiss.neighbors.records import InspectionProtocol, Interval, Selection, Summary

MapMethod = Literal["pca", "tsne"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Nodes:
    """The images of a page; all else refers to them by their index, the node."""

    ids: NDArray[np.int64]  # [P] id in the training set, -1 for a file
    names: tuple[str, ...]  # [P] any characters
    labels: NDArray[np.int64]  # [P] class index, -1 for an unlabelled image
    pictures: tuple[Image.Image, ...]  # [P] RGB, square, all of the same size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graph:
    """The neighbours of every node, most similar first, without the image itself."""

    neighbors: NDArray[np.int64]  # [P, K] nodes, padded with -1
    similarities: NDArray[np.float32]  # [P, K] cosine, padded with 0
    ages: NDArray[np.int64] | None  # [P, K] number of entries pushed since; None: the data set was searched
    complete: NDArray[np.bool_]  # [P] True: the nearest in the gallery; False: the nearest on the page


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram:
    """Numbers of neighbours by a value, separately for those with the query's class."""

    edges: NDArray[np.float64]  # [n + 1], ascending
    matching: NDArray[np.int64]  # [n] neighbours with their query's class
    others: NDArray[np.int64]  # [n] all others, including unlabelled ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """An image that many others retrieve."""

    node: int
    retrieved: int  # number of sampled images that retrieve it, without itself
    matching: float | None  # fraction of those that have its class; None: unlabelled


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPurity:
    """Purity of the neighbours of one class."""

    name: str
    purity: float
    interval: Interval
    images: int  # sampled


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Confusion:
    """Numbers of neighbours by the query's class and the neighbour's class."""

    labels: NDArray[np.int64]  # [C] classes of the matrix, ascending
    counts: NDArray[np.int64]  # [C, C] rows: the query's class; columns: the neighbour's
    totals: NDArray[np.int64]  # [C] labelled neighbours of each row, including those outside the matrix
    present: int  # number of classes that occur, in the matrix or not


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """Statistics of the neighbours of random images, or of all if the data set was searched."""

    summary: Summary
    similarity: Histogram
    age: Histogram | None  # None: the data set was searched
    hubs: tuple[Hub, ...]  # most retrieved first
    never_retrieved: float  # 0..1, fraction of the gallery that no sampled image retrieves
    purity_by_class: tuple[ClassPurity, ...]  # lowest purity first
    confusion: Confusion | None  # None: no labelled neighbours


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moment:
    """The neighbours of the queries at one checkpoint of a run."""

    step: int
    epoch: float
    neighbors: NDArray[np.int64]  # [Q, K] nodes, padded with -1
    similarities: NDArray[np.float32]  # [Q, K]
    images: int  # random ones, whose neighbours the purity is of
    purity: float | None
    purity_interval: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A k-means cluster, and random images of it."""

    size: int  # in images
    members: tuple[int, ...]  # nodes
    classes: tuple[tuple[str, float], ...]  # at most three, largest first, with their fraction of its labelled images


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingMap:
    """A projection of embeddings to two dimensions."""

    method: MapMethod
    nodes: NDArray[np.int64]  # [M]
    positions: NDArray[np.float32]  # [M, 2] in 0..1, y pointing up
    note: str  # explained variance or perplexity, readable


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Explorer:
    """Everything on a page."""

    protocol: InspectionProtocol
    classes: tuple[str, ...] | None  # names by label
    nodes: Nodes
    graph: Graph
    queries: tuple[int, ...]  # nodes, in the order of display
    order: Selection
    statistics: Statistics
    evolution: tuple[Moment, ...] = ()  # of the queries, by step
    clusters: tuple[Cluster, ...] = ()  # largest first
    cluster_of: NDArray[np.int64] | None = None  # [P] index in `clusters`, -1 for an image outside the gallery
    pairs: tuple[tuple[int, int, float], ...] = ()  # near-duplicates: two nodes and their cosine, highest first
    outliers: tuple[tuple[int, float], ...] = ()  # node and mean cosine of its neighbours, lowest first
    map: EmbeddingMap | None = None
