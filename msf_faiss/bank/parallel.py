"""Banks of several ranks: each rank brings rows of a step, and all have the neighbours of one bank.

All ranks call every method that takes rows or slots together, each with its own (see `Ranks.known_row_counts`); they
count as one batch, in the order of the ranks.

Shapes: W ranks, N slots in all, b rows of this rank, B rows of all, K neighbours, D dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from msf_faiss.bank.base import ApproximateBank, Bank
from msf_faiss.bank.ring import RingBank, check_state
from msf_faiss.distributed.ranks import Ranks, as_bytes, as_rows
from msf_faiss.search.canonical import ordered
from msf_faiss.search.neighbors import Neighbors

_SHARD = "shard."  # begins the names of what a shard adds to the state of a bank


class ParallelBank(ABC):
    """What the two placements have in common.

    Args:
        local: this rank's bank, empty.
        ranks: that fill and search it together.
    """

    def __init__(self, local: RingBank, ranks: Ranks) -> None:
        self.local, self._ranks = local, ranks
        self._own = self._after = 0  # entries of this rank in the last push, and entries pushed after those

    @property
    @abstractmethod
    def capacity(self) -> int: ...

    @property
    @abstractmethod
    def pushed(self) -> int: ...

    @property
    def dim(self) -> int:
        return self.local.dim

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        return self.local.device

    def __len__(self) -> int:
        return min(self.pushed, self.capacity)

    def age(self, slots: Tensor) -> Tensor:
        return (self.pushed - 1 - slots) % self.capacity

    def newest(self, count: int) -> Tensor:
        ages = self._after + torch.arange(min(count, self._own) - 1, -1, -1, device=self.device)
        return (self.pushed - 1 - ages[ages < len(self)]) % self.capacity

    def metrics(self) -> dict[str, float]:
        return self.local.metrics()

    def raise_recall(self) -> str:
        assert isinstance(self.local, ApproximateBank)
        return self.local.raise_recall()

    def _note_push(self, counts: Sequence[int]) -> None:
        self._own, self._after = counts[self._ranks.rank], sum(counts[self._ranks.rank + 1 :])


class ReplicatedBank(ParallelBank):
    """Every rank holds all entries and searches them for its own queries. Traffic: one all-gather a push."""

    def __repr__(self) -> str:
        return f"{self.local!r}, replicated on {self._ranks.size} ranks"

    @property
    def capacity(self) -> int:
        return self.local.capacity

    @property
    def pushed(self) -> int:
        return self.local.pushed

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        self.local.check_push(embeddings, ids)
        rounded = embeddings.detach().to(self.dtype)
        everyone = self._ranks.gather_rows(_pack(rounded, ids))
        self.local.push(*_unpack(everyone, rounded, ids))
        self._note_push(self._ranks.counts(len(ids)))

    def search(self, queries: Tensor, k: int) -> Neighbors:
        return self.local.search(queries, k)

    def search_exactly(self, queries: Tensor, k: int) -> Neighbors:
        assert isinstance(self.local, ApproximateBank)
        return self.local.search_exactly(queries, k)

    def mean_of(self, slots: Tensor) -> Tensor:
        return self.local.mean_of(slots)

    def reconstruct(self, slots: Tensor) -> Tensor:
        return self.local.reconstruct(slots)

    def ids(self, slots: Tensor) -> Tensor:
        return self.local.ids(slots)

    def state_dict(self) -> dict[str, Tensor]:
        return self.local.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.local.load_state_dict(state)


class ShardedBank(ParallelBank):
    """Every rank holds every W-th slot, so that capacity grows with the ranks, and searches them for all queries.

    Entry number s lies in slot s mod N as in any bank, and slot j at rank j mod W, in its slot j // W: each shard is a
    bank of its own whose entries come and go in their order. A push sends each row to its owner (all-to-all). A search
    gathers the queries, has every shard search all of them, and sends each query's candidates home, where they are
    merged canonically: similarities are computed pair by pair, so ids, order and bits are those of one bank. A mean
    gathers the winners' slots, and each owner's sums of its winners are reduced and scattered: no neighbour travels.

    Args:
        local: this rank's shard, of `shard_capacity(capacity, ranks)` slots. Its `max_age` belongs to this class.
        capacity: N, slots in all.
        ranks: that hold a shard each.
        max_age: see `RingBank`.

    Raises:
        ValueError: if there are fewer slots than ranks.
    """

    def __init__(self, local: RingBank, capacity: int, ranks: Ranks, *, max_age: int | None = None) -> None:
        assert local.capacity == shard_capacity(capacity, ranks)
        super().__init__(local, ranks)
        self._capacity, self._max_age, self._pushed = capacity, max_age, 0

    def __repr__(self) -> str:
        fill = f"{len(self):,} of {self.capacity:,} entries"
        return f"ShardedBank({fill}, on {self._ranks.size} ranks, here {self.local!r})"

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def pushed(self) -> int:
        return self._pushed

    @property
    def searchable(self) -> int:
        """Filled slots that are not too old to be found."""
        return len(self) if self._max_age is None else min(len(self), self._max_age + 1)

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        self.local.check_push(embeddings, ids)
        counts, rank = self._ranks.counts(len(ids)), self._ranks.rank
        numbers = self._pushed + np.arange(sum(counts))
        owners = np.split(numbers % self._capacity % self._ranks.size, np.cumsum(counts)[:-1])  # by rank, [b] each
        sent = np.bincount(owners[rank], minlength=self._ranks.size).tolist()
        received = [int((of == rank).sum()) for of in owners]
        first = self._pushed + sum(counts[:rank])
        mine = (first + torch.arange(len(ids), device=self.device)) % self._capacity % self._ranks.size  # [b]
        rounded = embeddings.detach().to(self.dtype)
        packed = _pack(rounded, ids)[mine.argsort(stable=True)]
        came = self._ranks.exchange_rows(packed, sent, received)  # rank after rank, so in their order
        self.local.push(*_unpack(came, rounded, ids))
        self._pushed += sum(counts)
        self._note_push(counts)

    def search(self, queries: Tensor, k: int) -> Neighbors:
        return self._ask(queries, k, self.local.search)

    def search_exactly(self, queries: Tensor, k: int) -> Neighbors:
        assert isinstance(self.local, ApproximateBank)
        return self._ask(queries, k, self.local.search_exactly)

    def mean_of(self, slots: Tensor) -> Tensor:
        if slots.shape[1] == 0:
            raise ValueError("there is no mean of no neighbours: the bank is empty, or k is 0")
        counts = self._ranks.counts(slots.shape[0])
        everyone = self._ranks.gather_rows(slots)  # [B, K]
        total = self._mine(everyone[:, 0], self.local.reconstruct)  # [B, D]
        for place in range(1, slots.shape[1]):
            total += self._mine(everyone[:, place], self.local.reconstruct)
        return self._ranks.scatter_sums(total, counts) / slots.shape[1]

    def reconstruct(self, slots: Tensor) -> Tensor:
        return self._look_up(slots, self.local.reconstruct)

    def ids(self, slots: Tensor) -> Tensor:
        return self._look_up(slots, self.local.ids)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's shard, with its place among the others; of a single rank the state of any bank."""
        if self._ranks.size == 1:
            return self.local.state_dict()
        layout = _Layout(self._capacity, self._ranks.size, self._ranks.rank, self._pushed)
        place = {f"{_SHARD}{name}": torch.tensor(value) for name, value in layout._asdict().items()}
        return {**self.local.state_dict(), **place}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over this rank's entries of a whole bank."""
        load_shards(self, 1, lambda _: state)

    def load_shard(self, state: dict[str, Tensor], pushed: int) -> None:
        """Take over this rank's shard of a bank of the same layout that was given `pushed` entries in all."""
        self.local.load_state_dict(state)
        self._pushed = pushed

    def _ask(self, queries: Tensor, k: int, search: Callable[[Tensor, int], Neighbors]) -> Neighbors:
        queries = self.local.check_queries(queries, k)
        kept, counts = min(k, self.searchable), self._ranks.counts(queries.shape[0])
        if kept == 0:
            return Neighbors(queries.new_empty(len(queries), 0).float(), queries.new_empty(len(queries), 0).long())
        everyone = self._ranks.gather_rows(queries)  # [B, D]
        live = self._owned(self._pushed) - self._owned(self._pushed - self.searchable)
        self.local.max_age = live - 1
        found = search(everyone, kept)  # [B, up to K]
        missing = (0, kept - found.slots.shape[1])
        similarities = torch.nn.functional.pad(found.similarities, missing, value=-torch.inf)  # [B, K]
        slots = torch.nn.functional.pad(found.slots * self._ranks.size + self._ranks.rank, missing)
        size, own = self._ranks.size, queries.shape[0]
        came = self._ranks.exchange_rows(_pack(similarities, slots), counts, [own] * size)
        similarities, slots = (
            each.view(size, own, kept).transpose(0, 1).reshape(own, size * kept)
            for each in _unpack(came, similarities, slots)
        )  # [b, W K] each
        return ordered(similarities, slots, self.age(slots), kept)

    def _owned(self, pushed: int) -> int:
        """How many of the first `pushed` entries came to this rank."""
        turns, rest = divmod(pushed, self._capacity)
        return turns * self.local.capacity + _every(rest, self._ranks.rank, self._ranks.size)

    def _mine(self, slots: Tensor, look: Callable[[Tensor], Tensor]) -> Tensor:
        """What `look` sees in local slots, where `slots` [...] are this rank's, and zeros elsewhere."""
        mine = slots % self._ranks.size == self._ranks.rank
        seen = look(slots // self._ranks.size * mine)
        return torch.where(mine.view(*mine.shape, *[1] * (seen.ndim - mine.ndim)), seen, torch.zeros_like(seen))

    def _look_up(self, slots: Tensor, look: Callable[[Tensor], Tensor]) -> Tensor:
        """What `look` sees in `slots` [b, ...], wherever they are."""
        counts = self._ranks.counts(slots.shape[0])
        return self._ranks.scatter_sums(self._mine(self._ranks.gather_rows(slots), look), counts)


def shard_capacity(capacity: int, ranks: Ranks) -> int:
    """Slots of this rank's shard of a bank of `capacity` slots.

    Raises:
        ValueError: if there are fewer slots than ranks.
    """
    if capacity < ranks.size:
        raise ValueError(f"{capacity} entries cannot be sharded over {ranks.size} ranks: at least one each")
    return _every(capacity, ranks.rank, ranks.size)


def load_shards(bank: Bank, count: int, read: Callable[[int], dict[str, Tensor]]) -> None:
    """Take over a bank that was saved by any number of ranks, in as many shards.

    A shard of the same layout is taken over as it is, with its index. Otherwise the entries are dealt anew, the newest
    that fit, in their order; every rank reads all shards then, and holds its part twice meanwhile.

    Args:
        bank: of any kind, capacity and number of ranks.
        count: saved shards; 1 may be a whole bank.
        read: the state of a shard by its number.

    Raises:
        ValueError: if the states are not those of one bank, or it has another dimension.
    """
    sharded = isinstance(bank, ShardedBank)
    size, rank = (bank._ranks.size, bank._ranks.rank) if isinstance(bank, ShardedBank) else (1, 0)
    state, layout = _split(read(rank if count == size else 0), bank.dim)
    if count == size and (layout.capacity == bank.capacity or not sharded):
        if isinstance(bank, ShardedBank):
            bank.load_shard(state, layout.pushed)
        else:
            bank.load_state_dict(state)
        return
    shards = [_split(read(number), bank.dim) for number in range(count)]
    saved = [layout for _, layout in shards]
    filled = sum(len(state["ids"]) for state, _ in shards)
    expected = [saved[0]._replace(rank=number, size=count) for number in range(count)]
    if saved != expected or filled != min(saved[0].pushed, saved[0].capacity):
        raise ValueError(f"the {count} saved shards, which hold {filled} entries, are not those of one bank")
    _deal(bank, size, rank, [state for state, _ in shards], saved[0])


def saved_capacity(state: dict[str, Tensor]) -> int | None:
    """Slots in all of the bank that a saved shard is a part of; None if the state is that of a whole bank."""
    name = f"{_SHARD}capacity"
    return int(state[name]) if name in state else None


class _Layout(NamedTuple):
    """Where a shard belongs, and how far the bank had come."""

    capacity: int
    size: int
    rank: int
    pushed: int


def _split(state: dict[str, Tensor], dim: int) -> tuple[dict[str, Tensor], _Layout]:
    """A saved shard as the state of a bank of its own, and its layout; a whole bank is its only shard."""
    own = {name: value for name, value in state.items() if not name.startswith(_SHARD)}
    check_state(own, dim)
    if len(own) == len(state):
        return own, _Layout(max(1, len(own["ids"])), 1, 0, int(own["pushed"]))
    if {name for name in state if name not in own} != {f"{_SHARD}{name}" for name in _Layout._fields}:
        raise ValueError(f"not the state of a shard: its keys are {sorted(state)}")
    return own, _Layout(*(int(state[f"{_SHARD}{name}"]) for name in _Layout._fields))


def _deal(bank: Bank, size: int, rank: int, shards: Sequence[dict[str, Tensor]], saved: _Layout) -> None:
    """Give `rank` of `size` that hold `bank` its part of the newest entries in `shards`."""
    filled = min(saved.pushed, saved.capacity)
    kept = min(filled, bank.capacity)
    # As in `RingBank.load_state_dict`: a bank that grows while full starts its count anew.
    pushed = saved.pushed if kept == min(saved.pushed, bank.capacity) else kept
    new = np.arange(pushed - kept, pushed)  # numbers of the entries in `bank`, the oldest first
    new = new[new % bank.capacity % size == rank]
    old = (new + saved.pushed - pushed) % saved.capacity  # their slots in the saved bank
    places = new % bank.capacity // size  # their slots in this rank's part
    embeddings = shards[0]["embeddings"].new_empty(len(new), bank.dim)
    ids = torch.empty(len(new), dtype=torch.int64)
    for number, shard in enumerate(shards):
        of = np.flatnonzero(old % saved.size == number)
        to, source = torch.from_numpy(places[of]), torch.from_numpy(old[of] // saved.size)
        embeddings[to], ids[to] = shard["embeddings"][source], shard["ids"][source]
    if isinstance(bank, ShardedBank):
        bank.load_shard(_state(embeddings, ids, bank._owned(pushed)), pushed)
    else:
        bank.load_state_dict(_state(embeddings, ids, pushed))


def _state(embeddings: Tensor, ids: Tensor, pushed: int) -> dict[str, Tensor]:
    return {"embeddings": embeddings, "ids": ids, "pushed": torch.tensor(pushed)}


def _every(count: int, first: int, step: int) -> int:
    """How many of 0..count - 1 are first, first + step, first + 2 step, ..."""
    return len(range(first, count, step))


def _pack(left: Tensor, right: Tensor) -> Tensor:
    """Rows of two tensors [b, ...] as one of bytes [b, n], so that they travel together."""
    return torch.cat([as_bytes(left), as_bytes(right)], dim=1)


def _unpack(packed: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The two tensors in `packed` [n, ...], of which `left` and `right` are like rows."""
    width = left.shape[1:].numel() * left.itemsize
    # Copies: a view of other bytes than the first may not be aligned for its dtype.
    parts = (part.clone(memory_format=torch.contiguous_format) for part in (packed[:, :width], packed[:, width:]))
    return as_rows(next(parts), left), as_rows(next(parts), right)
