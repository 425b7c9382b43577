"""Storage of a bank: a preallocated ring of vectors, their ids, and one counter.

Shapes: N capacity, n filled slots, M pushed vectors, B queries, K neighbours, D dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from msf_faiss.search.neighbors import Neighbors

_INDEX = "index."  # begins the names of what an index adds to a bank's state


class RingBank(ABC):
    """All of the `Bank` protocol but the search: entry number s (counted from 0) lies in slot s mod N.

    A kind of bank writes `_search`. One that keeps more than the ring (a compressed copy, an index) follows it in
    `_written`, and saves what cannot be derived from the ring in `_index_state` and `_load_index`.

    Args:
        max_age: entries after which this many others were pushed are no longer found; None: all are.

    Raises:
        ValueError: if capacity or dim is below 1, max_age below 0, or dtype is no floating dtype.
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
        if capacity < 1 or dim < 1:
            raise ValueError(f"a bank needs capacity and dim of at least 1, found {capacity} and {dim}")
        if max_age is not None and max_age < 0:
            raise ValueError(f"max_age must be at least 0, found {max_age}")
        if not dtype.is_floating_point:
            raise ValueError(f"a bank holds floating-point vectors, found {dtype}")
        self.max_age = max_age  # may be changed between two searches; -1: nothing is found
        self._entries = torch.zeros(capacity, dim, dtype=dtype, device=device)  # [N, D]
        self._ids = torch.zeros(capacity, dtype=torch.int64, device=device)  # [N]
        self._pushed = 0

    @property
    def capacity(self) -> int:
        return self._entries.shape[0]

    @property
    def dim(self) -> int:
        return self._entries.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._entries.dtype

    @property
    def device(self) -> torch.device:
        return self._entries.device

    @property
    def pushed(self) -> int:
        return self._pushed

    def __len__(self) -> int:
        return min(self._pushed, self.capacity)

    def __repr__(self) -> str:
        fill = f"{len(self):,} of {self.capacity:,} entries"
        return f"{type(self).__name__}({fill}, dim {self.dim}, {self.dtype}, {self.device})"

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        self.check_push(embeddings, ids)
        self._pushed += embeddings.shape[0]
        kept = min(embeddings.shape[0], self.capacity)
        self._write(embeddings.detach()[embeddings.shape[0] - kept :], ids[ids.shape[0] - kept :])

    def check_push(self, embeddings: Tensor, ids: Tensor) -> None:
        """Raise the error of `push` if these cannot be pushed."""
        self._check_vectors(embeddings, "embeddings")
        if ids.shape != embeddings.shape[:1] or ids.dtype != torch.int64 or ids.device != self.device:
            raise ValueError(
                f"ids must be [{embeddings.shape[0]}] int64 on {self.device}, "
                f"found {list(ids.shape)} {ids.dtype} on {ids.device}"
            )

    def search(self, queries: Tensor, k: int) -> Neighbors:
        return self._answer(queries, k, self._search)

    def check_queries(self, queries: Tensor, k: int) -> Tensor:
        """Queries as the ring would store them: [B, D], in the bank's dtype, contiguous.

        Raises:
            ValueError: see `Bank.search`.
        """
        self._check_vectors(queries, "queries")
        if k < 1:
            raise ValueError(f"k must be at least 1, found {k}")
        return queries.detach().to(self.dtype).contiguous()

    def _answer(self, queries: Tensor, k: int, search: Callable[[Tensor, int], Neighbors]) -> Neighbors:
        """What `search` finds, which is called as `_search` is."""
        queries = self.check_queries(queries, k)
        kept = min(k, self.searchable)
        if kept == 0 or queries.shape[0] == 0:
            shape = (queries.shape[0], kept)
            return Neighbors(
                torch.empty(shape, dtype=torch.float32, device=self.device),
                torch.empty(shape, dtype=torch.int64, device=self.device),
            )
        return search(queries, kept)

    @abstractmethod
    def _search(self, queries: Tensor, k: int) -> Neighbors:
        """Canonical neighbours of at least one query in the ring's dtype, with 1 <= k <= `searchable`."""

    @property
    def searchable(self) -> int:
        """Filled slots that are not too old to be found."""
        return len(self) if self.max_age is None else min(len(self), self.max_age + 1)

    def _live(self) -> list[tuple[int, int]]:
        """The searchable slots as one or two ranges [start, stop), the one that lies first in the ring first."""
        count, head = self.searchable, self._pushed % self.capacity
        start = (self._pushed - count) % self.capacity
        if count == 0:
            return []
        if count == self.capacity:
            return [(0, count)]
        if start < head:
            return [(start, head)]
        return [(0, head), (start, self.capacity)] if head else [(start, self.capacity)]

    def _aged(self, youngest: int, oldest: int) -> list[tuple[int, int]]:
        """The slots of entries of age [youngest, oldest), as ranges [start, stop)."""
        start = (self._pushed - oldest) % self.capacity
        stop = start + oldest - youngest
        if stop <= self.capacity:
            return [(start, stop)]
        return [(0, stop - self.capacity), (start, self.capacity)]

    def mean_of(self, slots: Tensor) -> Tensor:
        if slots.shape[1] == 0:
            raise ValueError("there is no mean of no neighbours: the bank is empty, or k is 0")
        # Rank by rank: [B, K, D] is never held, and the terms are added in the neighbours' order.
        total = self.reconstruct(slots[:, 0])  # [B, D]
        for rank in range(1, slots.shape[1]):
            total += self.reconstruct(slots[:, rank])
        return total / slots.shape[1]

    def reconstruct(self, slots: Tensor) -> Tensor:
        entries = self._entries[slots]  # [..., D]
        return entries if self.dtype == torch.float64 else entries.float()

    def ids(self, slots: Tensor) -> Tensor:
        return self._ids[slots]

    def age(self, slots: Tensor) -> Tensor:
        return (self._pushed - 1 - slots) % self.capacity

    def newest(self, count: int) -> Tensor:
        ages = torch.arange(min(count, len(self)) - 1, -1, -1, device=self.device)
        return (self._pushed - 1 - ages) % self.capacity

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        filled = len(self)
        return {
            "embeddings": self._entries[:filled],
            "ids": self._ids[:filled],
            "pushed": torch.tensor(self._pushed),
            **{f"{_INDEX}{name}": value for name, value in self._index_state().items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        check_state(state, self.dim)
        index = {name.removeprefix(_INDEX): value for name, value in state.items() if name.startswith(_INDEX)}
        entries, ids, pushed = state["embeddings"], state["ids"], int(state["pushed"])
        filled = entries.shape[0]
        kept = min(filled, self.capacity)
        # One counter tells the fill too, so a bank that grows while full starts its count anew.
        self._pushed = pushed if kept == min(pushed, self.capacity) else kept
        self._entries.zero_()
        self._ids.zero_()
        done = 0
        while done < kept:  # in contiguous pieces, the oldest first: a bank may fill most of the memory
            source, slot = (pushed - kept + done) % filled, (self._pushed - kept + done) % self.capacity
            count = min(kept - done, filled - source, self.capacity - slot)
            self._entries[slot : slot + count].copy_(entries[source : source + count])
            self._ids[slot : slot + count].copy_(ids[source : source + count])
            done += count
        # Of a ring that was taken over slot by slot the saved index still holds.
        same = self._pushed == pushed and filled == len(self) and entries.dtype == self.dtype
        self._load_index(index if same else {})

    def _written(self, start: int, stop: int) -> None:  # noqa: B027 - most kinds have nothing to follow
        """The slots [start, stop) hold new entries, the oldest first; `pushed` counts them already."""

    def _index_state(self) -> dict[str, Tensor]:
        """What a search depends on besides the ring, by name."""
        return {}

    def _load_index(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Follow a ring that was loaded as a whole, by what `_index_state` saved beside it; if empty, begin anew.

        Raises:
            ValueError: if it does not fit.
        """

    def _write(self, embeddings: Tensor, ids: Tensor) -> None:
        """Put at most N vectors into the slots that end at the newest, in one or two contiguous pieces."""
        count = embeddings.shape[0]
        start = (self._pushed - count) % self.capacity
        before_wrap = min(count, self.capacity - start)
        for slot, first, last in ((start, 0, before_wrap), (0, before_wrap, count)):
            if first < last:
                self._entries[slot : slot + last - first].copy_(embeddings[first:last])
                self._ids[slot : slot + last - first].copy_(ids[first:last])
                self._written(slot, slot + last - first)

    def _check_vectors(self, vectors: Tensor, what: str) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"{what} must be [*, {self.dim}], found {list(vectors.shape)}")
        if not vectors.dtype.is_floating_point:
            raise ValueError(f"{what} must be floating point, found {vectors.dtype}")
        if vectors.device != self.device:
            raise ValueError(f"{what} are on {vectors.device}, the bank is on {self.device}")


def check_state(state: dict[str, Tensor], dim: int) -> None:
    """Raise a ValueError if `state` is not that of a bank of `dim` dimensions."""
    if {name for name in state if not name.startswith(_INDEX)} != {"embeddings", "ids", "pushed"}:
        raise ValueError(f"not the state of a bank: its keys are {sorted(state)}")
    entries, ids, pushed = state["embeddings"], state["ids"], int(state["pushed"])
    if entries.ndim != 2 or entries.shape[1] != dim:
        raise ValueError(f"the saved bank has entries of shape {list(entries.shape)}, this one holds [n, {dim}]")
    filled = entries.shape[0]
    if ids.shape != (filled,) or ids.dtype != torch.int64 or not min(pushed, 1) <= filled <= pushed:
        raise ValueError(
            f"the saved bank is inconsistent: {filled} entries, {list(ids.shape)} ids of {ids.dtype}, {pushed} pushed"
        )
