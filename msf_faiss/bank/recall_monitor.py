"""Measures the recall of an approximate bank: every so many steps, a few queries are also searched exactly.

Shapes: B queries of a step, Q of them checked, K neighbours.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from msf_faiss.bank.base import Bank
from msf_faiss.search.neighbors import Neighbors

_MOST_RAISES = 40  # in a check: more than any bank needs to search exactly
_DECAY = 0.5  # weight of the earlier checks: few queries make a single check a rough estimate


class RecallMonitor:
    """Measures the recall of an approximate bank, and makes the bank raise it where it falls below `min_recall`.

    The bank raises it until the same queries reach `min_recall`, all in the check that finds it too low.

    Recall is the ratio of the true k nearest neighbours that the bank returned, the query's own entry left out.

    Args:
        every_steps: steps between two checks.
        queries: queries in a check, on each rank.
        min_recall: recall below which the bank must raise it.
        total: sums a tensor over the ranks, all of which check together; None: this process alone.
    """

    def __init__(
        self, *, every_steps: int, queries: int, min_recall: float, total: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._total = total or (lambda counts: counts)
        self._every_steps, self._queries, self._min_recall = every_steps, queries, min_recall
        self._counts = torch.zeros(2, dtype=torch.float64)  # neighbours returned, and neighbours to be returned

    @property
    def recall(self) -> float | None:
        """Recall of the checks so far, the latest weighted most; None before the first."""
        returned, wanted = self._counts.tolist()
        return returned / wanted if wanted else None

    def check(self, bank: Bank, neighbors: Neighbors, step: int) -> str | None:
        """Check the newest queries if a check is due.

        Args:
            bank: changed only by `raise_recall`.
            neighbors: neighbours [B, K] of the embeddings that were pushed last, in the order of the push.
            step: number of finished steps; a check is due at each multiple of `every_steps`.

        Returns:
            A sentence for the log if the recall was too low and the bank raised it, otherwise None.
        """
        if step % self._every_steps != 0:
            return None
        own = bank.newest(min(self._queries, neighbors.slots.shape[0]))  # [Q]
        # The bank rounds a query to its own dtype, so a query and its stored entry are interchangeable.
        queries, k = bank.reconstruct(own), neighbors.slots.shape[1]
        exact = bank.search_exactly(queries, k)
        newest = Neighbors(*(each[neighbors.slots.shape[0] - len(own) :] for each in neighbors))
        self._counts = _DECAY * self._counts + self._total(_agreement(newest, exact, own))
        recall = self.recall
        if recall is None or recall >= self._min_recall:
            return None
        change = None
        for _ in range(_MOST_RAISES):
            raised = bank.raise_recall()
            change = raised or change
            counts = torch.cat([_agreement(bank.search(queries, k), exact, own), torch.tensor([raised is not None])])
            returned, wanted, raises = self._total(counts).tolist()
            if not raises or returned >= self._min_recall * wanted:
                break
        self._counts = torch.zeros_like(self._counts)  # the bank is another one now
        return change and f"recall {recall:.3f} is below {self._min_recall:g}: {change}"

    def state_dict(self) -> dict[str, Tensor]:
        """The counts of the checks so far, [2] float64, the same on all ranks."""
        return {"counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the counts of `state_dict`."""
        self._counts = state["counts"]


def _agreement(neighbors: Neighbors, exact: Neighbors, own: Tensor) -> Tensor:
    """Number of the `exact` neighbours [Q, K] other than `own` [Q] that are in `neighbors` [Q, K], and number of all.

    Where many entries tie at the k-th place, as with a collapsed encoder, any of them counts as correct.
    """
    wanted = (exact.slots != own.unsqueeze(1)).sum(dim=1)  # [Q]
    correct = (neighbors.similarities >= exact.similarities[:, -1:]) & (neighbors.slots != own.unsqueeze(1))  # [Q, K]
    return torch.stack([correct.sum(dim=1).minimum(wanted).sum(), wanted.sum()]).cpu().double()
