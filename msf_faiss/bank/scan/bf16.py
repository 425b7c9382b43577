"""Exact search by a scan in bfloat16, proved from what rounding lost.

Shapes: B queries, C candidates, K neighbours, N slots, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msf_faiss.bank.scan.base import MOST_GROUPS, ScanBank
from msf_faiss.search.canonical import canonical
from msf_faiss.search.exact import unproven
from msf_faiss.search.faiss_engines import default_engine
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.search.torch_engine import products, shortlist, unrounded

_UNSCANNED = 15  # searches without a scan after one that proved less than half
_UNIT = 1 + 2.0**-8  # norm of a unit vector at most, after rounding to the ring's dtype


class Bf16ScanBank(ScanBank):
    """Exact: scans a copy in bfloat16, and proves by what rounding lost that no neighbour was missed.

    With t~, x~ what is scanned of a query t and an entry x, <t, x> <= <t~, x~> + |t - t~| |x| + |t~| |x - x~|. A query
    whose k-th neighbour is not above that bound of all entries that were not compared is searched exactly; if these are
    most of the queries, as of an untrained encoder whose embeddings are all alike, so are the next few searches,
    without a scan. On CUDA, where asking would wait for the device, a fixed number of groups is compared and the
    unproved are only counted. A bfloat16 ring is scanned itself.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        max_age: int | None = None,
    ) -> None:
        super().__init__(capacity, dim, dtype, device, max_age=max_age)
        self._copy = self._entries  # [N, D] bfloat16
        self._residuals = torch.zeros(1, device=self.device)  # [N] |x - x~|, or [1] where all are 0
        if dtype != torch.bfloat16:
            self._copy = torch.zeros(capacity, dim, dtype=torch.bfloat16, device=self.device)
            self._residuals = torch.zeros(capacity, device=self.device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=self.device)  # queries: proved, all
        self._unscanned = 0  # searches to come that do not scan

    def metrics(self) -> dict[str, float]:
        """proved_ratio: share of the queries since the last reading whose neighbours the scan proved to be right."""
        proved, every = self._counts.tolist()
        self._counts.zero_()
        return {"proved_ratio": proved / every} if every else {}

    def _written(self, start: int, stop: int) -> None:
        if self._copy is not self._entries:
            entries, copy = self._entries[start:stop], self._copy[start:stop]
            copy.copy_(entries)
            self._residuals[start:stop] = (entries.float() - copy.float()).norm(dim=1)

    def _index_state(self) -> dict[str, Tensor]:
        return {
            "bf16.counts": self._counts,
            "bf16.scan": torch.tensor([self._groups, self._next_groups, self._unscanned]),
        }

    def _load_index(self, state: dict[str, Tensor]) -> None:
        self._residuals.zero_()
        self._encode_all()
        self._counts.copy_(state.get("bf16.counts", torch.zeros(2)))
        *groups, self._unscanned = state.get("bf16.scan", torch.zeros(3, dtype=torch.int64)).tolist()
        self._groups, self._next_groups = (max(number, self._fewest) for number in groups)

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        self._counts[1] += queries.shape[0]
        if self._unscanned:
            self._unscanned -= 1
            return self._exactly(queries, k, self._live())
        slack = default_engine(self.device).error(self.dim)
        scanned = queries.bfloat16()
        listed = shortlist(*products(scanned, self._copy), self._live(), k + self._groups, queries)
        lost = (queries.float() - scanned.float()).norm(dim=1) * _UNIT  # [B]
        lost += scanned.float().norm(dim=1) * self._residuals.amax()
        bounds = unrounded(torch.cat([listed.maxima, listed.bound.unsqueeze(1)], dim=1)) + lost.unsqueeze(1)
        slots, bound = self._compare(queries, listed.rows, bounds, k, slack)
        found = canonical(queries, self._entries, slots, self.age(slots), k)
        doubted = unproven(found.similarities[:, -1], bound, slack)  # [B]
        self._counts[0] += (~doubted).sum()
        if not queries.is_cuda and (count := int(doubted.sum())):
            again = self._exactly(queries[doubted], k, self._live())
            found.similarities[doubted], found.slots[doubted] = again
            if self._groups < MOST_GROUPS:
                self._next_groups = min(2 * self._groups, MOST_GROUPS)
            elif 2 * count > queries.shape[0]:
                self._unscanned = _UNSCANNED
        return found
