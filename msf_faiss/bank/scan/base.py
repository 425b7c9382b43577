"""What the scanning banks have in common: candidates from a scan are compared exactly.

Shapes: B queries, C candidates, K neighbours, N slots, G groups, D dimensions.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from msf_faiss.bank.ring import RingBank, RingSpec
from msf_faiss.search.canonical import merge
from msf_faiss.search.exact import MARGIN, unproven
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.search.torch_engine import GROUP, compare

_MOST_EFFORT = 8
_CUDA_GROUPS = 64  # groups beyond k, all of which are compared
ENCODED_ROWS = 1024  # rows encoded at a time: they stay in the cache


@dataclass(frozen=True, kw_only=True)
class ScanLimits:
    """Sizes that the scanning banks work with. The defaults are the fastest measured; tests of small banks lower them.

    Args:
        newest: entries pushed last that int8 and pq search exactly (or all of the last push), and greatest k for which
            pq scans.
        margin: candidates beyond k that are rescored in float64.
        group: rows in a group, of whose products the scan keeps the largest.
        first_groups: groups beyond k that are listed at first on the CPU; doubled when they prove too few.
        most_groups: groups beyond k at most: listing more takes longer than what they prove saves.
        pause: searches without a scan after one that proved less than half of the queries (bf16).
        training: entries that pq's code books are trained on: half a second; 16 times as many gain .004 of recall.
    """

    newest: int = 256
    margin: int = MARGIN
    group: int = GROUP
    first_groups: int = 16
    most_groups: int = 128
    pause: int = 15
    training: int = 4096


class ScanBank(RingBank):
    """Proposes candidates by scanning a compressed copy of the ring, and compares them exactly.

    Args:
        spec: size, dtype and device.
        limits: None: the defaults.
    """

    def __init__(self, spec: RingSpec, *, limits: ScanLimits | None = None) -> None:
        self._limits = limits or ScanLimits()
        super().__init__(spec)
        self._groups = self._next_groups = self._fewest_groups  # beyond k; until the next push, and after it

    def _push(self, embeddings: Tensor, ids: Tensor) -> None:
        super()._push(embeddings, ids)
        self._groups = self._next_groups  # not in `search`, whose result must not depend on earlier searches

    @property
    def _fewest_groups(self) -> int:
        return _CUDA_GROUPS if self.device.type == "cuda" else self._limits.first_groups

    def _compare(self, queries: Tensor, rows: Tensor, bounds: Tensor, k: int, slack: float) -> tuple[Tensor, Tensor]:
        """Compare groups, best first, until the k-th neighbour of each query is proven or all groups are compared.

        Args:
            queries: [B, D].
            rows: slots of the groups, best group first, then of the rows in no group.
            bounds: [B, G + 1], the largest similarity possible in each group, and in all that are not listed.
            k: neighbours.
            slack: error of `bounds`.

        Returns:
            The best k + margin slots of each query [B, C], and a bound [B] of the similarity of all other entries.
        """
        group, margin = self._limits.group, self._limits.margin
        groups = bounds.shape[1] - 1
        done = groups if queries.is_cuda else min(k + margin, groups)
        first = torch.cat([rows[:, : group * done], rows[:, group * groups :]], dim=1)
        similarities = compare(queries, self._entries, first)  # [B, C]
        best, places = similarities.topk(min(k + margin, first.shape[1]), dim=1)
        slots = first.gather(1, places)
        bound = bounds[:, done].clone()
        open_ = torch.arange(queries.shape[0])
        while done < groups:
            open_ = open_[unproven(best[open_, k - 1], bound[open_], slack)]
            if open_.numel() == 0:
                break
            more = rows[open_, group * done : group * min(2 * done, groups)]
            done = min(2 * done, groups)
            every = torch.cat([best[open_], compare(queries[open_], self._entries, more)], dim=1)
            best[open_], places = every.topk(best.shape[1], dim=1)
            slots[open_] = torch.cat([slots[open_], more], dim=1).gather(1, places)
            bound[open_] = bounds[open_, done]
        if slots.shape[1] < first.shape[1]:
            bound = bound.maximum(best[:, -1])
        return slots, bound

    def _encode_all(self) -> None:
        for start in range(0, len(self), ENCODED_ROWS):
            self._written(start, min(start + ENCODED_ROWS, len(self)))


class ApproximateScanBank(ScanBank):
    """Searches the newest entries exactly, and the others by the scan.

    So a query's own entry, and the youngest of many equal entries, are returned however coarse the scan is.
    """

    def _allocate(self) -> None:
        self._effort = 1  # multiple of the candidates that are compared; 0: the search is exact
        self._last_push = 0

    def _push(self, embeddings: Tensor, ids: Tensor) -> None:
        super()._push(embeddings, ids)
        self._last_push = embeddings.shape[0]

    def raise_recall(self) -> str | None:
        if self._effort in (0, _MOST_EFFORT):
            self._effort = 0
            return "the bank searches exactly from now on"
        self._effort *= 2
        return f"the bank compares {self._effort} times as many candidates as at first from now on"

    @abstractmethod
    def _scan(self, queries: Tensor, k: int, newest: int) -> Neighbors:
        """Return at least k neighbours of age `newest` and above, if there are; others have similarity -inf."""

    def _can_scan(self, k: int) -> bool:
        """Whether `_scan` returns enough neighbours; otherwise the search is exact."""
        return True

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        newest = min(max(self._limits.newest, self._last_push), self.searchable)
        if newest == self.searchable or self._effort == 0 or not self._can_scan(k):
            return self._search_exactly(queries, k)
        young = self._search_slots(queries, min(k, newest), self._slots(0, newest))
        return merge(young, self._scan(queries, k, newest), k)


def round_up(count: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
