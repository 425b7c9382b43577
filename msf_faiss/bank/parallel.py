"""Banks of several ranks: each rank pushes and searches rows of its own, with the results of a single bank.

All ranks call every method that takes rows or slots together, each with its own, which form one batch in the order of
the ranks (see `Ranks.known_row_counts`).

Shapes: W ranks, N slots in all, b rows of this rank, B rows of all ranks, K neighbours, D dimensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from msf_faiss.bank.base import Bank, Layout
from msf_faiss.bank.ring import RingBank, RingSpec, check_averaged, check_state
from msf_faiss.distributed.ranks import Ranks, as_bytes, as_rows
from msf_faiss.search.arguments import check_slots
from msf_faiss.search.canonical import order_canonically
from msf_faiss.search.neighbors import Neighbors

_SHARD = "shard."  # prefix of the names that a shard adds to the state of a bank


class _ParallelBank(Bank):
    """What the two placements have in common.

    Args:
        local: this rank's bank, empty.
        ranks: that push and search together.
    """

    def __init__(self, local: RingBank, ranks: Ranks) -> None:
        self._local, self._ranks = local, ranks
        local.masks |= ranks.size > 1  # a rank that raises would leave the others waiting
        self.capacity, self.dim, self.dtype, self.device = local.capacity, local.dim, local.dtype, local.device
        self.engine_ms = local.engine_ms
        self._own = self._after = 0  # entries of this rank in the last push, and of the ranks after it

    def newest(self, count: int) -> Tensor:
        ages = self._after + torch.arange(min(count, self._own) - 1, -1, -1, device=self.device)
        return (self.pushed - 1 - ages[ages < len(self)]) % self.capacity

    def metrics(self) -> dict[str, float]:
        return self._local.metrics()

    def raise_recall(self) -> str | None:
        return self._local.raise_recall()

    def _record_push(self, counts: Sequence[int]) -> None:
        self._own, self._after = counts[self._ranks.rank], sum(counts[self._ranks.rank + 1 :])


class ReplicatedBank(_ParallelBank):
    """Every rank stores all entries and searches them for its own queries. Traffic: one all-gather per push."""

    def __repr__(self) -> str:
        return f"{self._local!r}, replicated on {self._ranks.size} ranks"

    @property
    def pushed(self) -> int:
        return self._local.pushed

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        self._local.check_push(embeddings, ids)
        rounded = embeddings.detach().to(self.dtype)
        gathered = self._ranks.gather_rows(_pack(rounded, ids))
        self._local.push(*_unpack(gathered, rounded, ids))
        self._record_push(self._ranks.counts(len(ids)))

    def search(self, queries: Tensor, k: int) -> Neighbors:
        return self._local.search(queries, k)

    def search_exactly(self, queries: Tensor, k: int) -> Neighbors:
        return self._local.search_exactly(queries, k)

    def mean_of(self, slots: Tensor) -> Tensor:
        return self._local.mean_of(slots)

    def reconstruct(self, slots: Tensor) -> Tensor:
        return self._local.reconstruct(slots)

    def ids(self, slots: Tensor) -> Tensor:
        return self._local.ids(slots)

    def layout(self) -> Layout:
        return self._local.layout()

    def state_dict(self) -> dict[str, Tensor]:
        return self._local.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._local.load_state_dict(state)

    def take_over(self, part: dict[str, Tensor], pushed: int) -> None:
        self._local.take_over(part, pushed)


class ShardedBank(_ParallelBank):
    """Every rank stores every W-th slot and searches its slots for all queries, so the capacity grows with the ranks.

    Each shard is a FIFO bank of its own (see `Layout`). A push sends each row to its owner (all-to-all). A search
    gathers the queries, searches all of them in every shard, and returns each query's candidates to its rank, which
    merges them canonically: similarities are computed pair by pair, so ids, order and bits are those of a single bank.
    A mean gathers the slots of the neighbours, and reduce-scatters each owner's partial sums, so no neighbour is sent.

    Args:
        create_local: creates this rank's shard; this class sets the `max_age` of the shard before each search.
        spec: of the whole bank.
        ranks: that store a shard each.

    Raises:
        ValueError: if there are fewer slots than ranks.
    """

    def __init__(self, create_local: Callable[[RingSpec], RingBank], spec: RingSpec, ranks: Ranks) -> None:
        if spec.capacity < ranks.size:
            raise ValueError(f"{spec.capacity} entries cannot be sharded over {ranks.size} ranks: at least one each")
        shard = Layout(spec.capacity, ranks.size, ranks.rank, 0)
        super().__init__(create_local(replace(spec, capacity=shard.slots, max_age=None)), ranks)
        self.capacity, self._max_age, self._pushed = spec.capacity, spec.max_age, 0

    def __repr__(self) -> str:
        fill = f"{len(self):,} of {self.capacity:,} entries"
        return f"ShardedBank({fill}, on {self._ranks.size} ranks, here {self._local!r})"

    @property
    def pushed(self) -> int:
        return self._pushed

    @property
    def searchable(self) -> int:
        """Number of entries that are not older than `max_age`."""
        return len(self) if self._max_age is None else min(len(self), self._max_age + 1)

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        self._local.check_push(embeddings, ids)
        counts, rank = self._ranks.counts(len(ids)), self._ranks.rank
        numbers = self._pushed + np.arange(sum(counts))
        owners = np.split(numbers % self.capacity % self._ranks.size, np.cumsum(counts)[:-1])  # by rank, [b] each
        sent = np.bincount(owners[rank], minlength=self._ranks.size).tolist()
        received = [int((of == rank).sum()) for of in owners]
        first = self._pushed + sum(counts[:rank])
        mine = (first + torch.arange(len(ids), device=self.device)) % self.capacity % self._ranks.size  # [b]
        rounded = embeddings.detach().to(self.dtype)
        packed = _pack(rounded, ids)[mine.argsort(stable=True)]
        arrived = self._ranks.exchange_rows(packed, sent, received)  # rank after rank, and so in order
        self._local.push(*_unpack(arrived, rounded, ids))
        self._pushed += sum(counts)
        self._record_push(counts)

    def search(self, queries: Tensor, k: int) -> Neighbors:
        return self._search_shards(queries, k, self._local.search)

    def search_exactly(self, queries: Tensor, k: int) -> Neighbors:
        return self._search_shards(queries, k, self._local.search_exactly)

    def mean_of(self, slots: Tensor) -> Tensor:
        check_averaged(slots, self.device)
        counts = self._ranks.counts(slots.shape[0])
        gathered = self._ranks.gather_rows(slots)  # [B, K]
        total = self._look_up_own(gathered[:, 0], self._local.reconstruct)  # [B, D]
        for place in range(1, slots.shape[1]):
            total += self._look_up_own(gathered[:, place], self._local.reconstruct)
        return self._ranks.scatter_sums(total, counts) / slots.shape[1]

    def reconstruct(self, slots: Tensor) -> Tensor:
        return self._look_up(slots, self._local.reconstruct)

    def ids(self, slots: Tensor) -> Tensor:
        return self._look_up(slots, self._local.ids)

    def layout(self) -> Layout:
        return Layout(self.capacity, self._ranks.size, self._ranks.rank, self._pushed)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of this rank's shard, with its layout; on a single rank, the state of a whole bank."""
        if self._ranks.size == 1:
            return self._local.state_dict()
        layout = {f"{_SHARD}{name}": torch.tensor(value) for name, value in self.layout()._asdict().items()}
        return {**self._local.state_dict(), **layout}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load this rank's entries of a whole bank."""
        load_shards(self, 1, lambda _: state)

    def take_over(self, part: dict[str, Tensor], pushed: int) -> None:
        self._local.load_state_dict(part)
        # A single shard may be loaded from a bank of another capacity, which may restart the count.
        self._pushed = pushed if self._ranks.size > 1 else self._local.pushed

    def _search_shards(self, queries: Tensor, k: int, search: Callable[[Tensor, int], Neighbors]) -> Neighbors:
        queries, masked, k = self._local.check_queries(queries, k)
        kept, counts = min(k, self.searchable), self._ranks.counts(queries.shape[0])
        if kept == 0:
            return Neighbors(queries.new_empty(len(queries), 0).float(), queries.new_empty(len(queries), 0).long())
        gathered, layout = self._ranks.gather_rows(queries), self.layout()  # [B, D]
        live = layout.count(self._pushed) - layout.count(self._pushed - self.searchable)
        self._local.max_age = live - 1
        candidates = search(gathered, kept)  # [B, up to K]
        missing = (0, kept - candidates.slots.shape[1])
        similarities = torch.nn.functional.pad(candidates.similarities, missing, value=-torch.inf)  # [B, K]
        slots = torch.nn.functional.pad(candidates.slots * self._ranks.size + self._ranks.rank, missing)
        size, own = self._ranks.size, queries.shape[0]
        received = self._ranks.exchange_rows(_pack(similarities, slots), counts, [own] * size)
        similarities, slots = (
            each.view(size, own, kept).transpose(0, 1).reshape(own, size * kept)
            for each in _unpack(received, similarities, slots)
        )  # [b, W K] each
        neighbors = order_canonically(similarities, slots, self.age(slots), kept)
        neighbors.similarities.masked_fill_(masked, torch.nan)
        return neighbors

    def _look_up_own(self, slots: Tensor, look_up: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `look_up` of those of `slots` [...] that this rank stores, and zeros for the others."""
        own = slots % self._ranks.size == self._ranks.rank
        values = look_up(slots // self._ranks.size * own)
        return torch.where(own.view(*own.shape, *[1] * (values.ndim - own.ndim)), values, torch.zeros_like(values))

    def _look_up(self, slots: Tensor, look_up: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `look_up` of `slots` [b, ...], whichever ranks store them."""
        check_slots(slots, self.device)
        counts = self._ranks.counts(slots.shape[0])
        return self._ranks.scatter_sums(self._look_up_own(self._ranks.gather_rows(slots), look_up), counts)


def load_shards(bank: Bank, count: int, read: Callable[[int], dict[str, Tensor]]) -> None:
    """Load a bank that any number of ranks saved, in as many shards.

    Shards of the same layout are loaded as they are, with their indexes. Otherwise every rank reads all shards, and
    takes its part of the newest entries that fit; its part is in memory twice in the meantime.

    Args:
        bank: of any kind, capacity and number of ranks.
        count: number of saved shards; 1 for a whole bank.
        read: returns the state of a shard by its number.

    Raises:
        ValueError: if the states are not those of one bank, or it has another dimension.
    """
    here = bank.layout()
    part, saved = _split(read(here.rank if count == here.size else 0), bank.dim)
    if count == here.size and (saved.capacity == here.capacity or here.size == 1):
        bank.take_over(part, saved.pushed)
        return
    parts, layouts = zip(*(_split(read(number), bank.dim) for number in range(count)), strict=True)
    filled = sum(len(part["ids"]) for part in parts)
    expected = tuple(layouts[0]._replace(rank=number, size=count) for number in range(count))
    if layouts != expected or filled != min(layouts[0].pushed, layouts[0].capacity):
        raise ValueError(f"the {count} saved shards, with {filled} entries, are not those of one bank")
    _distribute(bank, parts, layouts[0])


def saved_capacity(state: dict[str, Tensor]) -> int | None:
    """Return the capacity of the whole bank whose shard `state` is; None if `state` is that of a whole bank."""
    name = f"{_SHARD}capacity"
    return int(state[name]) if name in state else None


def _split(state: dict[str, Tensor], dim: int) -> tuple[dict[str, Tensor], Layout]:
    """Split the state of a shard into that of a bank of its own, and its layout; a whole bank is a single shard."""
    part = {name: value for name, value in state.items() if not name.startswith(_SHARD)}
    check_state(part, dim)
    if len(part) == len(state):
        return part, Layout(max(1, len(part["ids"])), 1, 0, int(part["pushed"]))
    if {name for name in state if name not in part} != {f"{_SHARD}{name}" for name in Layout._fields}:
        raise ValueError(f"not the state of a shard: its keys are {sorted(state)}")
    return part, Layout(*(int(state[f"{_SHARD}{name}"]) for name in Layout._fields))


def _distribute(bank: Bank, parts: Sequence[dict[str, Tensor]], saved: Layout) -> None:
    """Load into `bank` its part of the newest entries of the saved `parts`."""
    here = bank.layout()
    kept = min(saved.pushed, saved.capacity, here.capacity)
    # As in `RingBank.load_state_dict`: a full bank loaded into a larger one restarts the count.
    pushed = saved.pushed if kept == min(saved.pushed, here.capacity) else kept
    new = np.arange(pushed - kept, pushed)  # sequence numbers in `bank`, oldest first
    new = new[new % here.capacity % here.size == here.rank]
    old = (new + saved.pushed - pushed) % saved.capacity  # slots in the saved bank
    places = new % here.capacity // here.size  # slots in this part
    embeddings = parts[0]["embeddings"].new_empty(len(new), bank.dim)
    ids = torch.empty(len(new), dtype=torch.int64)
    for number, part in enumerate(parts):
        of = np.flatnonzero(old % saved.size == number)
        to, source = torch.from_numpy(places[of]), torch.from_numpy(old[of] // saved.size)
        embeddings[to], ids[to] = part["embeddings"][source], part["ids"][source]
    count = torch.tensor(here.count(pushed))
    bank.take_over({"embeddings": embeddings, "ids": ids, "pushed": count}, pushed)


def _pack(left: Tensor, right: Tensor) -> Tensor:
    """Concatenate the rows of two tensors [b, ...] as bytes [b, n], to send them together."""
    return torch.cat([as_bytes(left), as_bytes(right)], dim=1)


def _unpack(packed: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Split `packed` [b, n] into two tensors with rows like those of `left` and `right`."""
    width = left.shape[1:].numel() * left.itemsize
    # Copies: views of `packed` may not be aligned for their dtypes.
    parts = (part.clone(memory_format=torch.contiguous_format) for part in (packed[:, :width], packed[:, width:]))
    return as_rows(next(parts), left), as_rows(next(parts), right)
