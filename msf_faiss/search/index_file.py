"""Index files that FAISS alone can read, on any machine, with `faiss.read_index`.

Shapes: N vectors, D dimensions, L inverted lists, Q sampled queries.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msf_faiss.search.faiss_setup import faiss

IndexKind = Literal["flat", "ivf", "ivf-sq8"]
"""Exact search; inverted lists, of which a search probes a few; the same with 8-bit instead of 32-bit components."""

Vectors = NDArray[np.float32]

_CHUNK = 16_384  # vectors added at a time, and read from a memory map
_PER_LIST = (39, 64)  # training vectors per list: least of FAISS, and most
_QUERIES, _NEIGHBORS, _RECALL = 256, 10, 0.95  # decide the number of probes


class IndexFacts(NamedTuple):
    """Size and recall of an index."""

    kind: IndexKind
    entries: int
    dim: int
    lists: int | None  # L; None: the index has no lists
    probes: int | None  # lists that a search probes, as saved in the file
    recall: float | None  # recall@10 with these probes, measured on sampled vectors; None: the index is exact


def write_index(
    path: Path, vectors: Vectors, ids: NDArray[np.int64], *, kind: IndexKind = "flat", seed: int = 0
) -> IndexFacts:
    """Write an inner-product index of `vectors` [N, D] (unit norm; may be a memory map) with `ids` [N].

    The index is an IndexIDMap2: a search returns ids, and `reconstruct` accepts them. Spherical k-means on a sample
    that depends on `seed` creates 4 √N inverted lists, at most N / 39. The index probes as many lists as a recall@10
    of 95 % relative to probing all lists needs, measured on sampled vectors.

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
    with path.open("wb") as file:  # FAISS opens only UTF-8 names, and does not report why it cannot write
        _write(index, file.write)
    lists, probes = (None, None) if kind == "flat" else (inner.nlist, inner.nprobe)
    return IndexFacts(kind, len(vectors), vectors.shape[1], lists, probes, recall)


def list_count(count: int) -> int:
    """Return the number of inverted lists for `count` vectors."""
    return max(1, min(round(4 * math.sqrt(count)), count // _PER_LIST[0]))


def _trained(vectors: Vectors, kind: IndexKind, seed: int) -> Any:
    """Train an index without vectors."""
    dim, lists = vectors.shape[1], list_count(len(vectors))
    quantizer = faiss.IndexFlatIP(dim)
    if kind == "ivf":
        index = faiss.IndexIVFFlat(quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT)
    else:
        bits = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(quantizer, dim, lists, bits, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.spherical = seed, True
    index.cp.min_points_per_centroid = 1  # suppresses a warning
    index.train(_sample(vectors, _PER_LIST[1] * lists, seed))
    return index


def _choose_probes(index: Any, vectors: Vectors, seed: int) -> float:
    """Double the probes until they suffice; return their recall relative to an exact search."""
    queries = _sample(vectors, _QUERIES, seed + 1)  # [Q, D]
    kept = min(_NEIGHBORS + 1, len(vectors))  # each finds itself
    index.nprobe = index.nlist
    _, best = index.search(queries, kept)  # not exact with 8-bit codes
    index.nprobe = 1
    while _recall(neighbors := index.search(queries, kept)[1], best) < _RECALL and index.nprobe < index.nlist:
        index.nprobe = min(2 * index.nprobe, index.nlist)
    return _recall(neighbors, faiss.knn(queries, vectors, kept, metric=faiss.METRIC_INNER_PRODUCT)[1])


def _recall(neighbors: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Return the ratio of `truth` [Q, K], without the queries themselves, that is in `neighbors`, row by row."""
    others = truth.shape[1] - 1
    hits = sum(max(0, len(np.intersect1d(*pair)) - 1) for pair in zip(truth, neighbors, strict=True))
    return hits / (len(truth) * others) if others else 1.0


def _sample(vectors: Vectors, count: int, seed: int) -> Vectors:
    """Return at most `count` of the vectors, in their order."""
    if len(vectors) <= count:
        return np.ascontiguousarray(vectors)
    rows = np.random.default_rng(seed).choice(len(vectors), count, replace=False)
    return np.ascontiguousarray(vectors[np.sort(rows)])


def _write(index: Any, write: Callable[[bytes], int]) -> None:
    writer = faiss.PyCallbackIOWriter(write)
    faiss.write_index(index, writer)
    del writer  # flushes its buffer
