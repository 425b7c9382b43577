"""The storage of a bank: a preallocated ring of vectors, their ids, and one counter.

Shapes: N capacity, n filled slots, M pushed vectors, B queries, K neighbours, D dimensions.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from msf_faiss.bank.base import Bank, Layout
from msf_faiss.search.arguments import are_unit, as_count, check_slots, check_tensor, check_unit, check_vectors
from msf_faiss.search.exact import search_exactly
from msf_faiss.search.faiss_engines import default_engine
from msf_faiss.search.neighbors import Neighbors

_INDEX = "index."  # prefix of the names that an index adds to a bank's state


@dataclass(frozen=True)
class RingSpec:
    """Size, dtype and device of a bank.

    Args:
        capacity: N, number of slots.
        dim: D, dimension of an entry.
        dtype: of the stored entries.
        device: of the entries and of all queries.
        max_age: greatest age (entries pushed since) at which a search returns an entry; None: no limit.

    Raises:
        ValueError: if capacity, dim or max_age is no integer, capacity or dim is below 1, or max_age below 0.
    """

    capacity: int
    dim: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    max_age: int | None = None

    def __post_init__(self) -> None:
        # FAISS accepts no other integers than Python's.
        object.__setattr__(self, "capacity", as_count(self.capacity, "capacity"))
        object.__setattr__(self, "dim", as_count(self.dim, "dim"))
        if self.max_age is not None:
            object.__setattr__(self, "max_age", as_count(self.max_age, "max_age", least=0))


class RingBank(Bank):
    """All of `Bank` but the search. Entry number s (from 0) is in slot s mod N.

    Subclasses implement `_search`. A subclass that keeps data beside the ring (a compressed copy, an index) creates
    them in `_allocate`, updates them in `_written` or `_push`, and saves what does not follow from the ring in
    `_index_state` and `_load_index`. One whose `_search` may miss neighbours also implements `raise_recall`.

    Raises:
        ValueError: if the kind of bank does not support the dtype or device of `spec`.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16, torch.bfloat16)
    cpu_only: ClassVar[bool] = False

    def __init__(self, spec: RingSpec) -> None:
        kind = type(self).__name__
        if spec.dtype not in self.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            raise ValueError(f"{kind} stores {names}, not {spec.dtype}")
        if self.cpu_only and torch.device(spec.device).type != "cpu":
            raise ValueError(
                f"{kind} runs on the CPU only; on {spec.device} choose bank.kind flat, or scan with bf16 or int8"
            )
        self.max_age = spec.max_age  # may be changed between searches; -1: nothing is returned
        self.capacity, self.dim, self.dtype = spec.capacity, spec.dim, spec.dtype
        self._entries = torch.zeros(spec.capacity, spec.dim, dtype=spec.dtype, device=spec.device)  # [N, D]
        self._ids = torch.zeros(spec.capacity, dtype=torch.int64, device=spec.device)  # [N]
        self._pushed = 0
        self.device = self._entries.device
        # Whether rows that are not finite unit vectors are masked, because raising would wait for the device or for
        # other ranks; otherwise they are refused.
        self.masks = self.device.type == "cuda"
        self._masked = torch.zeros((), dtype=torch.int64, device=self.device)  # rows, since the last metrics
        self._engine, self.engine_ms = default_engine(self.device), {}
        self._allocate()

    @staticmethod
    def extra_bytes(dim: int, dtype: torch.dtype) -> float:
        """Memory of an entry beside its place in the ring, in bytes."""
        return 0

    @property
    def pushed(self) -> int:
        return self._pushed

    def __repr__(self) -> str:
        fill = f"{len(self):,} of {self.capacity:,} entries"
        return f"{type(self).__name__}({fill}, dim {self.dim}, {self.dtype}, {self.device})"

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        self.check_push(embeddings, ids)
        embeddings = embeddings.detach()
        if self.masks:
            unit = are_unit(embeddings)  # [M]
            self._masked += (~unit).sum()
            embeddings = embeddings.masked_fill(~unit.unsqueeze(1), 0)
        self._push(embeddings, ids)

    def _push(self, embeddings: Tensor, ids: Tensor) -> None:
        """Push what `push` has checked."""
        self._pushed += embeddings.shape[0]
        kept = min(embeddings.shape[0], self.capacity)
        self._write(embeddings[embeddings.shape[0] - kept :], ids[ids.shape[0] - kept :])

    def check_push(self, embeddings: Tensor, ids: Tensor) -> None:
        """Raise the ValueError of `push` if these cannot be pushed."""
        check_vectors(embeddings, "embeddings", self.dim, self.device)
        if not self.masks:
            check_unit(embeddings, "embeddings")
        check_tensor(ids, "ids")
        if ids.shape != embeddings.shape[:1] or ids.dtype != torch.int64 or ids.device != self.device:
            raise ValueError(
                f"ids must be [{embeddings.shape[0]}] int64 on {self.device}, "
                f"found {list(ids.shape)} {ids.dtype} on {ids.device}"
            )

    def search(self, queries: Tensor, k: int) -> Neighbors:
        return self._answer(queries, k, self._search)

    def search_exactly(self, queries: Tensor, k: int) -> Neighbors:
        return self._answer(queries, k, self._search_exactly)

    def check_queries(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor, int]:
        """Check the arguments of a search.

        Returns:
            `queries` [B, D] as the ring would store them, in the bank's dtype and contiguous; which of them are masked,
            [B, 1]; and `k` as an int.

        Raises:
            ValueError: see `Bank.search`.
        """
        check_vectors(queries, "queries", self.dim, self.device)
        k, queries = as_count(k, "k"), queries.detach()
        masked = torch.zeros(queries.shape[0], 1, dtype=torch.bool, device=self.device)
        if self.masks:
            masked = ~are_unit(queries).unsqueeze(1)
            queries = queries.masked_fill(masked, 0)
        else:
            check_unit(queries, "queries")
        return queries.to(self.dtype).contiguous(), masked, k

    def _answer(self, queries: Tensor, k: int, search: Callable[[Tensor, int], Neighbors]) -> Neighbors:
        """Check the arguments, answer what needs no search, and leave the rest to `search`."""
        queries, masked, k = self.check_queries(queries, k)
        kept = min(k, self.searchable)
        if kept == 0 or queries.shape[0] == 0:
            shape = (queries.shape[0], kept)
            return Neighbors(
                torch.empty(shape, dtype=torch.float32, device=self.device),
                torch.empty(shape, dtype=torch.int64, device=self.device),
            )
        neighbors = search(queries, kept)
        neighbors.similarities.masked_fill_(masked, torch.nan)
        return neighbors

    @abstractmethod
    def _search(self, queries: Tensor, k: int) -> Neighbors:
        """Return canonical neighbours of B >= 1 queries in the ring's dtype, with 1 <= k <= `searchable`."""

    def _search_exactly(self, queries: Tensor, k: int) -> Neighbors:
        return self._search_slots(queries, k, self._live_slots())

    def _search_slots(self, queries: Tensor, k: int, ranges: list[tuple[int, int]]) -> Neighbors:
        """Return the exact neighbours among the slots in `ranges`, at least k."""
        return search_exactly(self._engine, queries, self._entries, ranges, self.age, k)

    def raise_recall(self) -> str | None:
        return "the search is exact already"

    @property
    def searchable(self) -> int:
        """Number of entries that are not older than `max_age`."""
        return len(self) if self.max_age is None else min(len(self), self.max_age + 1)

    def _live_slots(self) -> list[tuple[int, int]]:
        """Return the slots of the searchable entries as ranges [start, stop)."""
        return self._slots(0, self.searchable)

    def _slots(self, youngest: int, oldest: int) -> list[tuple[int, int]]:
        """Return the slots of the entries of age [youngest, oldest) as ranges [start, stop), lowest first."""
        count = oldest - youngest
        if count in (0, self.capacity):
            return [(0, count)] if count else []
        start = (self._pushed - oldest) % self.capacity
        stop = start + count
        return [(start, stop)] if stop <= self.capacity else [(0, stop - self.capacity), (start, self.capacity)]

    def mean_of(self, slots: Tensor) -> Tensor:
        check_averaged(slots, self.device)
        # Neighbour by neighbour: in their order, and without allocating [B, K, D].
        total = self.reconstruct(slots[:, 0])  # [B, D]
        for rank in range(1, slots.shape[1]):
            total += self.reconstruct(slots[:, rank])
        return total / slots.shape[1]

    def reconstruct(self, slots: Tensor) -> Tensor:
        check_slots(slots, self.device)
        entries = self._entries[slots]  # [..., D]
        return entries if self.dtype == torch.float64 else entries.float()

    def ids(self, slots: Tensor) -> Tensor:
        check_slots(slots, self.device)
        return self._ids[slots]

    def newest(self, count: int) -> Tensor:
        ages = torch.arange(min(count, len(self)) - 1, -1, -1, device=self.device)
        return (self._pushed - 1 - ages) % self.capacity

    def metrics(self) -> dict[str, float]:
        masked = int(self._masked)
        self._masked.zero_()
        return {"masked_rows": float(masked)} if masked else {}

    def layout(self) -> Layout:
        return Layout(self.capacity, 1, 0, self._pushed)

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
        check_unit(state["embeddings"], "the saved entries")
        index = {name.removeprefix(_INDEX): value for name, value in state.items() if name.startswith(_INDEX)}
        entries, ids, pushed = state["embeddings"], state["ids"], int(state["pushed"])
        filled = entries.shape[0]
        kept = min(filled, self.capacity)
        # The fill follows from the counter, so a full bank loaded into a larger one restarts the count.
        self._pushed = pushed if kept == min(pushed, self.capacity) else kept
        self._entries.zero_()
        self._ids.zero_()
        done = 0
        while done < kept:  # contiguous pieces, oldest first: no copy of a bank that may fill most of the memory
            source, slot = (pushed - kept + done) % filled, (self._pushed - kept + done) % self.capacity
            count = min(kept - done, filled - source, self.capacity - slot)
            self._entries[slot : slot + count].copy_(entries[source : source + count])
            self._ids[slot : slot + count].copy_(ids[source : source + count])
            done += count
        # A saved index is valid only for a ring whose slots are unchanged.
        same = self._pushed == pushed and filled == len(self) and entries.dtype == self.dtype
        self._load_index(index if same else {})

    def take_over(self, part: dict[str, Tensor], pushed: int) -> None:
        self.load_state_dict(part)

    def _allocate(self) -> None:
        """Create what this kind of bank keeps beside the ring, as of an empty bank."""

    def _written(self, start: int, stop: int) -> None:
        """The slots [start, stop) have new entries, oldest first, which `pushed` already counts."""

    def _index_state(self) -> dict[str, Tensor]:
        """Return what a search depends on besides the ring, by name."""
        return {}

    def _load_index(self, state: dict[str, Tensor]) -> None:
        """Restore what `_index_state` returned for the ring that was just loaded; if empty, derive it from the ring.

        Raises:
            ValueError: if `state` does not fit.
        """

    def _write(self, embeddings: Tensor, ids: Tensor) -> None:
        """Write at most N vectors as the newest entries, in one or two contiguous pieces."""
        count = embeddings.shape[0]
        start = (self._pushed - count) % self.capacity
        before_wrap = min(count, self.capacity - start)
        for slot, first, last in ((start, 0, before_wrap), (0, before_wrap, count)):
            if first < last:
                self._entries[slot : slot + last - first].copy_(embeddings[first:last])
                self._ids[slot : slot + last - first].copy_(ids[first:last])
                self._written(slot, slot + last - first)


def check_averaged(slots: Tensor, device: torch.device) -> None:
    """Raise ValueError unless `slots` are [B, K] int64 on `device`, K >= 1."""
    check_slots(slots, device)
    if slots.ndim != 2:
        raise ValueError(f"slots must be [B, K], found {list(slots.shape)}")
    if slots.shape[1] == 0:
        raise ValueError("cannot average zero neighbours: the bank is empty, or k is 0")


def check_state(state: dict[str, Tensor], dim: int) -> None:
    """Raise ValueError unless `state` is that of a bank of dimension `dim`."""
    if {name for name in state if not name.startswith(_INDEX)} != {"embeddings", "ids", "pushed"}:
        raise ValueError(f"not the state of a bank: its keys are {sorted(state)}")
    for name, value in state.items():
        check_tensor(value, f"the saved bank's {name}")
    entries, ids, pushed = state["embeddings"], state["ids"], int(state["pushed"])
    if entries.ndim != 2 or entries.shape[1] != dim or not entries.dtype.is_floating_point:
        raise ValueError(
            f"the saved bank has entries {list(entries.shape)} {entries.dtype}, this bank needs [n, {dim}] floats"
        )
    filled = entries.shape[0]
    if ids.shape != (filled,) or ids.dtype != torch.int64 or not min(pushed, 1) <= filled <= pushed:
        raise ValueError(
            f"the saved bank is inconsistent: {filled} entries, {list(ids.shape)} ids of {ids.dtype}, {pushed} pushed"
        )
