"""How a bank knows how good its answers are: now and then a few queries are searched exactly as well.

Shapes: B queries of a step, Q of them checked, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msf_faiss.bank.base import ApproximateBank
from msf_faiss.search.neighbors import Neighbors

_DECAY = 0.5  # an older check counts half as much as the next: few queries make one check a rough figure


class RecallWatch:
    """Measures the recall of an approximate bank, and has it improve where that is below what was promised.

    Recall is the share of the true k nearest neighbours that were found, the query's own entry left out on both sides.

    Args:
        every: steps between two checks.
        queries: queries in a check, of each rank.
        min_recall: what is promised.
        total: sums a tensor over the ranks, all of which check together; None: this process alone.
    """

    def __init__(
        self, every: int, queries: int, min_recall: float, total: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._total = total or (lambda counts: counts)
        self._every, self._queries, self._min_recall = every, queries, min_recall
        self._counts = torch.zeros(2, dtype=torch.float64)  # found, and to be found

    @property
    def recall(self) -> float | None:
        """As of the last checks; None before the first."""
        found, all_of_them = self._counts.tolist()
        return found / all_of_them if all_of_them else None

    @property
    def pending(self) -> Tensor:
        """What the next check builds on: [2] float64. A resumed run goes on from it."""
        return self._counts

    @pending.setter
    def pending(self, counts: Tensor) -> None:
        self._counts = counts

    def check(self, bank: ApproximateBank, found: Neighbors, step: int) -> str | None:
        """Check the newest queries of step number `step`, if it is time to.

        Args:
            bank: changed in nothing but by `improve`.
            found: what the bank found for the embeddings that it was pushed last, in their order.
            step: finished steps.

        Returns:
            What the bank did to find more, in words; None if nothing had to be done.
        """
        if step % self._every != 0:
            return None
        own = bank.newest(min(self._queries, found.slots.shape[0]))  # [Q]
        # A query is compared as the ring would store it, so its entry is as good as the query.
        exact = bank.search_exactly(bank.reconstruct(own), found.slots.shape[1])
        newest = Neighbors(*(each[found.slots.shape[0] - len(own) :] for each in found))
        counts = torch.tensor(_agreement(newest, exact, own), dtype=torch.float64)
        self._counts = _DECAY * self._counts + self._total(counts)
        recall = self.recall
        if recall is None or recall >= self._min_recall:
            return None
        done = bank.improve()
        self._counts = torch.zeros_like(self._counts)  # what was counted is about the bank as it was
        return f"recall {recall:.3f} is below {self._min_recall:g}: {done}"


def _agreement(found: Neighbors, exact: Neighbors, own: Tensor) -> tuple[int, int]:
    """How many of the `exact` neighbours [Q, K] other than `own` [Q] were `found` [Q, K], and of how many.

    Where many entries tie at the k-th place, as in a collapsed encoder, any of them is as right as the others.
    """
    wanted = (exact.slots != own.unsqueeze(1)).sum(dim=1)  # [Q]
    right = (found.similarities >= exact.similarities[:, -1:]) & (found.slots != own.unsqueeze(1))  # [Q, K]
    return int(right.sum(dim=1).minimum(wanted).sum()), int(wanted.sum())
