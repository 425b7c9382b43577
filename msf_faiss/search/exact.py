"""Exact search: an engine proposes candidates, and its bound on all other rows proves that none is missing.

Shapes: B queries, C candidates of each, K neighbours, n rows of a range, N slots, D dimensions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msf_faiss.search.canonical import rescore
from msf_faiss.search.neighbors import Neighbors

MARGIN = 8  # candidates beyond k, so that rounding cannot hide a neighbour
_WIDER = 8  # factor by which the candidates grow where the margin may be too small,
_WIDEST = 1024  # up to this many: with a collapsed encoder, whose entries all tie, a step must not take minutes


class Proposal(NamedTuple):
    """Candidates of each query, and a bound on the similarity of all other rows."""

    slots: Tensor  # [B, C] int64, distinct for a query, in any order
    bound: Tensor  # [B] float32, greatest computed similarity of a row that is not proposed; -inf if there is none


class Engine(ABC):
    """Computes similarities and selects the largest."""

    name: str
    """Value of `bank.engine` that selects this engine."""

    def error(self, dim: int) -> float:
        """Return a bound on the error of a computed similarity of two unit vectors of `dim` dimensions.

        The probabilistic bound for float32 dot products (Higham and Mary, 2019). It also holds for 16-bit vectors:
        their products are exact in float32, and are summed in float32.
        """
        return 4 * math.sqrt(dim) * 2.0**-24

    @abstractmethod
    def propose(self, queries: Tensor, rows: Tensor, count: int) -> Proposal:
        """Propose at least the `count` rows with the largest computed similarity to each of `queries` [B, D].

        Args:
            queries: contiguous, of the dtype and device of `rows`, B >= 1.
            rows: [n, D], contiguous, read in place; the proposed slots are row numbers.
            count: 1 <= count <= n.
        """


def search_exactly(
    engine: Engine,
    queries: Tensor,
    entries: Tensor,
    ranges: Sequence[tuple[int, int]],
    ages: Callable[[Tensor], Tensor],
    k: int,
) -> Neighbors:
    """Return the canonical k nearest of the slots in `ranges` of `entries` [N, D] for `queries` [B, D].

    On the CPU every result is checked: where rounding could have hidden a neighbour (duplicates, a collapsed encoder)
    the search is repeated with more candidates, up to k + 1,024. On CUDA the check is omitted, because it would
    synchronize with the device.

    Args:
        engine: proposes the candidates.
        queries: of the dtype and device of `entries`, contiguous, B >= 1.
        entries: the ring.
        ranges: disjoint ranges [start, stop) of slots, none empty.
        ages: returns the ages of slots.
        k: at most the number of slots in `ranges`.
    """
    total = sum(stop - start for start, stop in ranges)
    count = min(k + MARGIN, total)
    neighbors, bound = _search(engine, queries, entries, ranges, ages, k, count)
    if queries.is_cuda:
        return neighbors
    slack = engine.error(queries.shape[1])
    doubtful = torch.arange(queries.shape[0])
    widest = min(k + _WIDEST, total)
    while count < widest:
        doubtful = doubtful[unproven(neighbors.similarities[doubtful, -1], bound, slack)]
        if doubtful.numel() == 0:
            break
        count = min(count * _WIDER, widest)
        again, bound = _search(engine, queries[doubtful], entries, ranges, ages, k, count)
        neighbors.similarities[doubtful], neighbors.slots[doubtful] = again
    return neighbors


def unproven(kth: Tensor, bound: Tensor, slack: float | Tensor) -> Tensor:
    """Return for which queries a row that was not proposed may belong among the neighbours: [B] bool.

    Args:
        kth: [B] float32, canonical similarity of the k-th neighbour.
        bound: [B] float32, see `Proposal`.
        slack: error of the similarities behind `bound`, [] or [B].
    """
    # Rounding to float32 may make two similarities of up to 1 equal, and ties are ordered by age.
    return ~(kth > bound + slack + 2.0**-23)


def _search(
    engine: Engine,
    queries: Tensor,
    entries: Tensor,
    ranges: Sequence[tuple[int, int]],
    ages: Callable[[Tensor], Tensor],
    k: int,
    count: int,
) -> tuple[Neighbors, Tensor]:
    parts = [
        Proposal(proposed.slots + start, proposed.bound)
        for start, stop in ranges
        for proposed in [engine.propose(queries, entries[start:stop], min(count, stop - start))]
    ]
    slots = torch.cat([part.slots for part in parts], dim=1)  # [B, C]
    bound = torch.stack([part.bound for part in parts]).amax(dim=0)  # [B]
    return rescore(queries, entries, slots, ages(slots), k), bound
