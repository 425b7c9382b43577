"""Exact search by a scan in bfloat16, with a proof from the rounding errors.

Shapes: B queries, K neighbours, N slots, D dimensions.
"""

import torch
from torch import Tensor

from msf_faiss.bank.scan.base import ScanBank
from msf_faiss.search.arguments import NORM_TOLERANCE
from msf_faiss.search.canonical import rescore
from msf_faiss.search.exact import unproven
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.search.torch_engine import products, shortlist, unrounded

_NORM = (1 + NORM_TOLERANCE) * (1 + 2.0**-8)  # greatest norm of an entry: rounding to the ring's dtype changes it


class Bf16ScanBank(ScanBank):
    """Exact: scans a copy in bfloat16, and proves from the rounding errors that no neighbour was missed.

    With t~, x~ the rounded query t and entry x, <t, x> <= <t~, x~> + |t - t~| |x| + |t~| |x - x~|. A query whose k-th
    neighbour is not above that bound for all entries that were not compared is searched exactly. If these are most
    queries, as with an untrained encoder whose embeddings are all close, the next few searches skip the scan. On CUDA,
    where the check would synchronize with the device, a fixed number of groups is compared, and unproven queries are
    only counted. A bfloat16 ring needs no copy.
    """

    @staticmethod
    def extra_bytes(dim: int, dtype: torch.dtype) -> float:
        return 0 if dtype == torch.bfloat16 else 2 * dim + 4

    def _allocate(self) -> None:
        self._copy = self._entries  # [N, D] bfloat16
        self._residuals = torch.zeros(1, device=self.device)  # [N] |x - x~|, or [1] where all are 0
        if self.dtype != torch.bfloat16:
            self._copy = torch.zeros(self.capacity, self.dim, dtype=torch.bfloat16, device=self.device)
            self._residuals = torch.zeros(self.capacity, device=self.device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=self.device)  # queries: proven, all
        self._unscanned = 0  # searches to come that skip the scan

    def metrics(self) -> dict[str, float]:
        """Return `proved_ratio`: queries whose neighbours the scan proved, as a ratio of all since the last call."""
        proven, queries = self._counts.tolist()
        self._counts.zero_()
        return super().metrics() | ({"proved_ratio": proven / queries} if queries else {})

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
        self._groups, self._next_groups = (max(number, self._fewest_groups) for number in groups)

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        self._counts[1] += queries.shape[0]
        if self._unscanned:
            self._unscanned -= 1
            return self._search_exactly(queries, k)
        limits, slack = self._limits, self._engine.error(self.dim)
        scanned = queries.bfloat16()
        product, dtype = products(scanned, self._copy)
        listed = shortlist(product, dtype, self._live_slots(), k + self._groups, queries, group=limits.group)
        lost = (queries.float() - scanned.float()).norm(dim=1) * _NORM  # [B]
        lost += scanned.float().norm(dim=1) * self._residuals.amax()
        bounds = unrounded(torch.cat([listed.maxima, listed.bound.unsqueeze(1)], dim=1)) + lost.unsqueeze(1)
        slots, bound = self._compare(queries, listed.rows, bounds, k, slack)
        neighbors = rescore(queries, self._entries, slots, self.age(slots), k)
        doubted = unproven(neighbors.similarities[:, -1], bound, slack)  # [B]
        self._counts[0] += (~doubted).sum()
        if not queries.is_cuda and (count := int(doubted.sum())):
            again = self._search_exactly(queries[doubted], k)
            neighbors.similarities[doubted], neighbors.slots[doubted] = again
            if self._groups < limits.most_groups:
                self._next_groups = min(2 * self._groups, limits.most_groups)
            elif 2 * count > queries.shape[0]:
                self._unscanned = limits.pause
        return neighbors
