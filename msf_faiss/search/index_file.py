"""Indices on disk that plain FAISS reads, on any machine: `faiss.read_index`.

Shapes: N vectors, D dimensions, L inverted lists, Q sampled queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msf_faiss.search.faiss_setup import faiss

IndexKind = Literal["flat", "ivf", "ivf-sq8"]
"""Exact; inverted lists, of which a search reads the nearest few; the same with a byte a number instead of four."""

Vectors = NDArray[np.float32]

_CHUNK = 16_384  # vectors added at a time: those of a memory map are read then
_PER_LIST = (39, 64)  # vectors to train a list with: FAISS's least, and what is enough
_QUERIES, _NEIGHBORS, _RECALL = 256, 10, 0.95  # what the number of probes is chosen by


class IndexFacts(NamedTuple):
    """What was built."""

    kind: IndexKind
    entries: int
    dim: int
    lists: int | None  # L; None: there are none
    probes: int | None  # lists that a search reads, as it is saved in the file
    recall: float | None  # share of the 10 nearest others of sampled vectors that is found so; None: all, by nature


def write_index(
    path: Path, vectors: Vectors, ids: NDArray[np.int64], *, kind: IndexKind = "flat", seed: int = 0
) -> IndexFacts:
    """Write an index of `vectors` [N, D] (unit norm; may be a memory map) under `ids` [N], by inner product.

    It is an IndexIDMap2, so that a search returns ids and `reconstruct` takes them. Of inverted lists there are
    4 √N, but no more than N / 39; k-means on unit vectors makes them from a sample that follows from `seed`, and the
    index probes as many of them as find 95 % of what all of them would find among the nearest 10 of sampled vectors.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if there are no vectors.
    """
    if not len(vectors):
        raise ValueError("an index needs at least one vector")
    inner = faiss.IndexFlatIP(vectors.shape[1]) if kind == "flat" else _trained(vectors, kind, seed)
    index = faiss.IndexIDMap2(inner)
    for start in range(0, len(vectors), _CHUNK):
        part = slice(start, start + _CHUNK)
        index.add_with_ids(np.ascontiguousarray(vectors[part]), ids[part])
    recall = None
    if kind != "flat":
        inner.make_direct_map()  # reconstruct needs it
        recall = _choose_probes(inner, vectors, seed)
    with path.open("wb") as file:  # by Python: FAISS opens no name that is not UTF-8, and hides why it cannot write
        _write(index, file.write)
    lists, probes = (None, None) if kind == "flat" else (inner.nlist, inner.nprobe)
    return IndexFacts(kind, len(vectors), vectors.shape[1], lists, probes, recall)


def list_count(count: int) -> int:
    """Inverted lists for so many vectors."""
    return max(1, min(round(4 * math.sqrt(count)), count // _PER_LIST[0]))


def _trained(vectors: Vectors, kind: IndexKind, seed: int) -> Any:
    """Empty inverted lists."""
    dim, lists = vectors.shape[1], list_count(len(vectors))
    quantizer = faiss.IndexFlatIP(dim)
    if kind == "ivf":
        index = faiss.IndexIVFFlat(quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT)
    else:
        bits = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(quantizer, dim, lists, bits, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.spherical = seed, True
    index.cp.min_points_per_centroid = 1  # fewer than 39 make one list: FAISS need not warn of it
    index.train(_sample(vectors, _PER_LIST[1] * lists, seed))
    return index


def _choose_probes(index: Any, vectors: Vectors, seed: int) -> float:
    """Double the probes until they find enough; the recall that they then have, against exact search."""
    queries = _sample(vectors, _QUERIES, seed + 1)  # [Q, D]
    kept = min(_NEIGHBORS + 1, len(vectors))  # each finds itself
    index.nprobe = index.nlist
    _, best = index.search(queries, kept)  # codes of a byte a number may miss some even so
    index.nprobe = 1
    while _recall(found := index.search(queries, kept)[1], best) < _RECALL and index.nprobe < index.nlist:
        index.nprobe = min(2 * index.nprobe, index.nlist)
    return _recall(found, faiss.knn(queries, vectors, kept, metric=faiss.METRIC_INNER_PRODUCT)[1])


def _recall(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Share of each row of `truth` [Q, K], but for the query itself, that is in the same row of `found`."""
    others = truth.shape[1] - 1
    hits = sum(max(0, len(np.intersect1d(*pair)) - 1) for pair in zip(truth, found, strict=True))
    return hits / (len(truth) * others) if others else 1.0


def _sample(vectors: Vectors, count: int, seed: int) -> Vectors:
    """At most `count` of the vectors, in their order."""
    if len(vectors) <= count:
        return np.ascontiguousarray(vectors)
    rows = np.random.default_rng(seed).choice(len(vectors), count, replace=False)
    return np.ascontiguousarray(vectors[np.sort(rows)])


def _write(index: Any, write: Callable[[bytes], int]) -> None:
    writer = faiss.PyCallbackIOWriter(write)
    faiss.write_index(index, writer)
    del writer  # hands the last of its buffer over
