"""Exact search: an engine proposes candidates, and what it says about the others proves that none is missing.

Shapes: B queries, C candidates of each, K neighbours, n rows of a range, N slots, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from msf_faiss.search.canonical import canonical
from msf_faiss.search.neighbors import Neighbors

MARGIN = 8  # candidates beyond k, so that rounding cannot hide a neighbour
_WIDER = 8  # times as many candidates when the margin may have been too small,
_WIDEST = 1024  # up to so many: a collapsed encoder, whose entries all tie, must not make a step take minutes


class Proposal(NamedTuple):
    """Candidates of each query, and what is known of all other rows."""

    slots: Tensor  # [B, C] int64, none twice for one query, in any order
    bound: Tensor  # [B] float32: no row that is not proposed has a computed similarity above it; -inf if all are


class Engine(Protocol):
    """A way of computing similarities and finding the largest."""

    @property
    def name(self) -> str:
        """As a config calls it."""

    def error(self, dim: int) -> float:
        """How far a computed similarity of two unit vectors of `dim` dimensions may be from the true one."""

    def propose(self, queries: Tensor, rows: Tensor, count: int) -> Proposal:
        """At least the `count` rows of largest computed similarity for each of `queries` [B, D].

        Args:
            queries: contiguous, of the dtype and device of `rows`, B >= 1.
            rows: [n, D], a contiguous range of a ring, read in place; proposed by their number in it.
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
    """Canonical top k of `queries` [B, D] among the slots in `ranges` of `entries` [N, D].

    On the CPU every answer is checked: where rounding could have hidden a neighbour (duplicates, a collapsed encoder)
    the search is repeated with more candidates, up to k + 1,024. On CUDA that check would wait for the device and is
    left out.

    Args:
        engine: proposes the candidates.
        queries: of the dtype and device of `entries`, contiguous, B >= 1.
        entries: the ring.
        ranges: [start, stop) each, disjoint, not empty.
        ages: of slots.
        k: at most as many as there are slots in `ranges`.
    """
    total = sum(stop - start for start, stop in ranges)
    count = min(k + MARGIN, total)
    found, bound = _answer(engine, queries, entries, ranges, ages, k, count)
    if queries.is_cuda:
        return found
    slack = engine.error(queries.shape[1])
    doubtful = torch.arange(queries.shape[0])
    widest = min(k + _WIDEST, total)
    while count < widest:
        doubtful = doubtful[unproven(found.similarities[doubtful, -1], bound, slack)]
        if doubtful.numel() == 0:
            break
        count = min(count * _WIDER, widest)
        again, bound = _answer(engine, queries[doubtful], entries, ranges, ages, k, count)
        found.similarities[doubtful], found.slots[doubtful] = again
    return found


def unproven(kth: Tensor, bound: Tensor, slack: float | Tensor) -> Tensor:
    """Whether a row that was not proposed might belong among the neighbours: [B] bool.

    Args:
        kth: [B] float32, canonical similarity of the k-th neighbour found.
        bound: [B] float32, see `Proposal`.
        slack: how far the similarities behind `bound` may be off, [] or [B].
    """
    # Rounding to float32 may make two similarities of up to 1 equal, and ties go by age.
    return ~(kth > bound + slack + 2.0**-23)


def _answer(
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
    return canonical(queries, entries, slots, ages(slots), k), bound
