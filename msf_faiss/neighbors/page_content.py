"""What a page of neighbours holds: images, the graph of who is whose neighbour, and what follows from it. No torch.

Shapes: P images of the page (its nodes), Q queries, K neighbours of each, M points of a map, n bins of a histogram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msf_faiss.neighbors.records import InspectionProtocol


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Nodes:
    """The images of a page, in the page's own order; everything else names them by their place in it."""

    ids: NDArray[np.int64]  # [P] in the training set, -1: a file that is not in it
    names: tuple[str, ...]  # [P] for people; any characters
    labels: NDArray[np.int64]  # [P] class index, -1 where there is none
    pictures: tuple[Image.Image, ...]  # [P] RGB, square, all of one side


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graph:
    """The neighbours of every node, all of them nodes themselves, the most similar first, its own image left out."""

    neighbors: NDArray[np.int64]  # [P, K] nodes, -1 where there are no more
    similarities: NDArray[np.float32]  # [P, K] cosine; 0 where there are no more
    ages: NDArray[np.int64] | None  # [P, K] entries pushed since; None: the data set was searched
    complete: NDArray[np.bool_]  # [P] True: the nearest of all that was searched. False: the nearest on the page


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram:
    """Counts of neighbours by a value, those with the query's class apart."""

    edges: NDArray[np.float64]  # [n + 1], rising
    matching: NDArray[np.int64]  # [n] neighbours with their query's class
    others: NDArray[np.int64]  # [n] all others, unlabelled ones too


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """An image that very many others retrieve."""

    node: int
    retrieved: int  # by how many of the images that were asked, own image left out
    matching: float | None  # share of those that have its class; None: it has no label


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """Of the neighbours of many images, drawn at random (all of them where the data set was searched)."""

    images: int  # that were asked
    similarity: Histogram
    age: Histogram | None  # None: the data set was searched
    purity_by_rank: tuple[float | None, ...]  # [K]
    similarity_by_rank: tuple[float | None, ...]  # [K]
    purity: float | None
    chance: float | None  # purity of random neighbours
    hubs: tuple[Hub, ...]  # the most retrieved first
    never_retrieved: float  # 0..1, share of the searched images that no one retrieves
    purity_by_class: tuple[tuple[str, float, int], ...]  # class, purity, images asked; the worst first


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moment:
    """What the queries retrieved at one checkpoint of a run."""

    step: int
    epoch: float
    neighbors: NDArray[np.int64]  # [Q, K] nodes, -1 where there are no more
    similarities: NDArray[np.float32]  # [Q, K]
    purity: float | None  # over the queries


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A cluster of k-means, and some of its images at random."""

    size: int  # images in it
    members: tuple[int, ...]  # nodes
    class_name: str | None  # the commonest
    share: float | None  # 0..1, of its labelled images that have that class


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingMap:
    """Two dimensions that keep as much as two can of who is near whom."""

    method: Literal["pca", "tsne"]
    nodes: NDArray[np.int64]  # [M]
    positions: NDArray[np.float32]  # [M, 2] in 0..1, y upwards
    note: str  # for people: explained variance, or perplexity


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Explorer:
    """All that a page shows."""

    protocol: InspectionProtocol
    classes: tuple[str, ...] | None  # names by label
    nodes: Nodes
    graph: Graph
    queries: tuple[int, ...]  # nodes that the page begins with, in this order
    order: Literal["random", "chosen", "worst"]  # how they were found; worst: the lowest purity first
    statistics: Statistics
    evolution: tuple[Moment, ...] = ()  # by step; of `queries`
    clusters: tuple[Cluster, ...] = ()  # the largest first
    map: EmbeddingMap | None = None
