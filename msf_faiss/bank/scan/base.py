"""What banks that scan a compressed copy of the ring share: the exact re-ranking of what the scan proposes.

Shapes: B queries, C candidates, K neighbours, N slots, D dimensions.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from msf_faiss.bank.ring import RingBank
from msf_faiss.search.canonical import merged
from msf_faiss.search.exact import MARGIN, search_exactly, unproven
from msf_faiss.search.faiss_engines import default_engine
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.search.torch_engine import GROUP, compare

_NEWEST = 256  # entries pushed last that approximate banks search exactly, or all of the last push
_MOST_EFFORT = 8
_FEWEST = 16  # groups beyond k that are listed at first; twice as many each time that they were too few for a query,
MOST_GROUPS = 128  # up to so many: listing more takes longer than what they prove saves
_GROUPS_CUDA = 64  # that are compared always
ROWS = 1024  # encoded at a time: they stay in the cache


class ScanBank(RingBank):
    """What the scanning banks share: the ring's dtypes, and the exact search that they fall back on."""

    def __init__(
        self,
        capacity: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        max_age: int | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"a scanning bank holds float32, float16 or bfloat16, found {dtype}")
        super().__init__(capacity, dim, dtype, device, max_age=max_age)
        self._groups = self._next_groups = self._fewest  # beyond k that a scan lists, until the next push and after

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        super().push(embeddings, ids)
        self._groups = self._next_groups  # not in `search`, so that it gives the same answer twice

    @property
    def _fewest(self) -> int:
        return _GROUPS_CUDA if self.device.type == "cuda" else _FEWEST

    def _exactly(self, queries: Tensor, k: int, ranges: list[tuple[int, int]]) -> Neighbors:
        return search_exactly(default_engine(self.device), queries, self._entries, ranges, self.age, k)

    def _compare(self, queries: Tensor, rows: Tensor, bounds: Tensor, k: int, slack: float) -> tuple[Tensor, Tensor]:
        """The best k + 8 slots of each query, [B, C], and a bound [B] of all that are not among them."""
        groups = bounds.shape[1] - 1
        done = groups if queries.is_cuda else min(k + MARGIN, groups)
        first = torch.cat([rows[:, : GROUP * done], rows[:, GROUP * groups :]], dim=1)
        similarities = compare(queries, self._entries, first)  # [B, C]
        best, places = similarities.topk(min(k + MARGIN, first.shape[1]), dim=1)
        slots = first.gather(1, places)
        bound = bounds[:, done].clone()
        open_ = torch.arange(queries.shape[0])
        while done < groups:
            open_ = open_[unproven(best[open_, k - 1], bound[open_], slack)]
            if open_.numel() == 0:
                break
            more = rows[open_, GROUP * done : GROUP * min(2 * done, groups)]
            done = min(2 * done, groups)
            every = torch.cat([best[open_], compare(queries[open_], self._entries, more)], dim=1)
            best[open_], places = every.topk(best.shape[1], dim=1)
            slots[open_] = torch.cat([slots[open_], more], dim=1).gather(1, places)
            bound[open_] = bounds[open_, done]
        if slots.shape[1] < first.shape[1]:
            bound = bound.maximum(best[:, -1])
        return slots, bound

    def _encode_all(self) -> None:
        for start in range(0, len(self), ROWS):
            self._written(start, min(start + ROWS, len(self)))


class ApproximateScanBank(ScanBank):
    """An `ApproximateBank`: the newest entries are searched exactly, the others by what the scan proposes.

    That finds a query's own entry, and the right ones among many that are equal, however coarse the scan is.
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
        self._effort = 1  # times as many candidates as at first; 0: the search is exact
        self._last_push = 0

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        super().push(embeddings, ids)
        self._last_push = embeddings.shape[0]

    def search_exactly(self, queries: Tensor, k: int) -> Neighbors:
        return self._answer(queries, k, lambda some, kept: self._exactly(some, kept, self._live()))

    def raise_recall(self) -> str:
        if self._effort in (0, _MOST_EFFORT):
            self._effort = 0
            return "the bank searches exactly from now on"
        self._effort *= 2
        return f"{self._effort} times as many entries as at first are compared exactly from now on"

    @abstractmethod
    def _older(self, queries: Tensor, k: int, newest: int) -> Neighbors:
        """The nearest neighbours of age `newest` and above, at least k if there are; others have similarity -inf."""

    def _can_scan(self, k: int) -> bool:
        """Whether the scan can be relied on; otherwise the search is exact."""
        return True

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        newest = min(max(_NEWEST, self._last_push), self.searchable)
        if newest == self.searchable or self._effort == 0 or not self._can_scan(k):
            return self._exactly(queries, k, self._live())
        young = self._exactly(queries, min(k, newest), self._aged(0, newest))
        return merged(young, self._older(queries, k, newest), k)


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
