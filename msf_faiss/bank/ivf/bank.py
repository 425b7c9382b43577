"""The approximate bank: inverted lists that follow the ring, entry by entry.

Shapes: N slots, n filled slots, M pushed vectors, B queries, K neighbours, L lists, P probed lists, C candidates,
D dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msf_faiss.bank.ivf.build import IvfBuild
from msf_faiss.bank.ivf.segments import SegmentedLists
from msf_faiss.bank.ring import RingBank
from msf_faiss.search.canonical import canonical, merged
from msf_faiss.search.exact import MARGIN, search_exactly
from msf_faiss.search.faiss_engines import default_engine
from msf_faiss.search.neighbors import Neighbors

_FIRST = 16_384  # entries from which lists are quicker than an exact search
_GROWTH = 4  # times as many entries, and lists are made anew, twice as many
_PER_LIST = 32  # entries of a list there should be at least
_WORK = 4  # rows that a build compares with all centroids for each pushed entry
_BULK = 65_536  # rows that are compared at a time when lists are made at once
_LOPSIDED = 3.0  # times as unequal as they were when they were made, and lists are made anew
_LOOKS = 8  # at that in a rotation
_SAMPLED = 64  # queries by which a build finds out how many lists to probe
_WIDEST = 4  # probing more than a fourth of the lists is no quicker than an exact search


def extra_bytes(dim: int) -> float:
    """What an entry takes beside the ring: code and id, in lists that double as they grow, and its list."""
    return 2 * (dim + 8) + 8


class IvfBank(RingBank):
    """Approximate FIFO bank in CPU memory.

    An entry is found if one of the lists that a query probes holds it; what is found is compared exactly, in the
    ring. The entries of the last push are always compared. Lists are made while pushes go on, a little at each, when
    the bank holds 16,384 entries, four times as many, and so on up to a quarter of a segment; until there are any, and
    where they are too bad, the search is exact. A ring that is loaded without its lists gets them at once. Lists that
    have become unequal, since an encoder in training left some of them behind, are made anew beside the old ones.

    Args:
        lists: of each segment; None: about four times the root of its capacity.
        probes: of each segment for a query, at first; None: as many as a sample of queries shows to be enough.
        segments: parts of the ring with centroids of their own, see `SegmentedLists`.
        min_recall: what `probes=None` aims at, with a margin of half of what is missing to 1.

    Raises:
        ValueError: if dtype is none of float32, float16 and bfloat16, the device is not the CPU, or there are more
            lists or segments than entries.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        lists: int | None = None,
        probes: int | None = None,
        segments: int = 1,
        min_recall: float = 0.95,
        max_age: int | None = None,
    ) -> None:
        if torch.device(device).type != "cpu":
            raise ValueError("an inverted file is searched in CPU memory only; on a GPU choose kind flat or scan")
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"an ivf bank holds float32, float16 or bfloat16, found {dtype}")
        super().__init__(capacity, dim, dtype, device, max_age=max_age)
        self._segment = -(-capacity // segments)  # slots; the last segment may have fewer
        if segments > capacity or (lists is not None and lists > self._segment):
            raise ValueError(f"ivf: {capacity:,} entries are too few for {segments:,} segments of {lists or 1:,} lists")
        self._engine = default_engine(self.device)
        self._wanted_lists = lists or _fitting_lists(self._segment)
        self._wanted_probes = probes
        self._target = (1 + min_recall) / 2
        self._reset()

    def _reset(self) -> None:
        self._lists: SegmentedLists | None = None
        self._build: IvfBuild | None = None
        self._probes = 0
        self._last = 0  # entries of the last push
        self._imbalance = math.inf  # of the lists when they were made
        self._exact = False  # whether lists are not used: while better ones are made, or for good
        self._remade = -1  # entries pushed when lists were last made anew because they were bad; -1: never
        self._answered = torch.zeros(2, dtype=torch.int64)  # queries answered exactly, and all, since the last reading

    def __repr__(self) -> str:
        known = "no lists yet" if self._lists is None else f"{self._lists.lists:,} lists, {self._probes:,} probed"
        segments = -(-self.capacity // self._segment)
        return f"{super().__repr__()[:-1]}, {known}{f', {segments} segments' if segments > 1 else ''})"

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        if embeddings.shape[0] >= self.capacity:  # nothing remains of what lists and build are about
            self._exact &= self._build is None  # unless the search is exact for good
            self._lists = self._build = None
        if self._lists is not None:
            self._lists.follow()
        super().push(embeddings, ids)
        if count := embeddings.shape[0]:
            self._last = min(count, self.capacity)
            self._make_lists(_WORK * count)

    def _written(self, start: int, stop: int) -> None:
        if self._lists is not None:
            self._lists.write(start, stop, self._probes)
        if self._build is not None:
            self._build.replace(start, stop)

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        self._answered[1] += queries.shape[0]
        if self._lists is None or self._exact:
            self._answered[0] += queries.shape[0]
            return self._exactly(queries, k, self._live())
        recent, count = min(self._last, self.searchable), k + MARGIN
        similarities, slots = self._lists.search(queries, self._probes, count, self._live())
        similarities.masked_fill_(self.age(slots) < recent, -torch.inf)  # these are compared anyway
        if slots.shape[1] > count:
            similarities, places = similarities.topk(count, dim=1)
            slots = slots.gather(1, places)
        found = canonical(queries, self._entries, slots, self.age(slots), count, valid=~similarities.isneginf())
        if recent:
            young = self._exactly(queries, min(k, recent), self._aged(0, recent))
            found = merged(young, found, k)
        found = Neighbors(*(each[:, :k].contiguous() for each in found))
        few = found.similarities[:, -1].isneginf()  # the probed lists hold less than k
        if bool(few.any()):
            again = self._exactly(queries[few], k, self._live())
            found.similarities[few], found.slots[few] = again
            self._answered[0] += few.sum()
        return found

    def search_exactly(self, queries: Tensor, k: int) -> Neighbors:
        return self._answer(queries, k, lambda some, kept: self._exactly(some, kept, self._live()))

    def _exactly(self, queries: Tensor, k: int, ranges: list[tuple[int, int]]) -> Neighbors:
        return search_exactly(self._engine, queries, self._entries, ranges, self.age, k)

    def raise_recall(self) -> str:
        if self._lists is None:
            return "the search is exact already"
        if 2 * self._probes <= self._lists.lists // _WIDEST:
            self._probes *= 2
            return f"a query probes {self._probes:,} of {self._lists.lists:,} lists from now on"
        self._exact = True
        if self._remade < 0 or self._pushed - self._remade >= self.capacity:
            self._build = IvfBuild(self._entries, len(self), self._lists.lists, self._segment)
            self._lists = None  # two sets of lists would take more memory than the bank was given
            return "lists are made anew, and the search is exact until then"
        self._lists = None
        return "lists that were made anew are no better, so the search is exact from now on"

    def metrics(self) -> dict[str, float]:
        exact, every = self._answered.tolist()
        self._answered.zero_()
        found = {"exact_ratio": exact / every} if every else {}
        if self._lists is not None:
            found |= {"probes": float(self._probes), "list_imbalance": self._lists.imbalance}
        return found

    def _make_lists(self, rows: int) -> None:
        """Begin to make the lists that the bank needs by now, and go on with `rows` rows."""
        have = self._lists.lists if self._lists is not None else 0
        given_up = self._exact and self._lists is None and self._build is None
        if self._build is None and not given_up:
            due = self._lists_due()
            if due > have or (due > 0 and self._looks(rows // _WORK) and self._lopsided()):
                self._build = IvfBuild(self._entries, len(self), due, self._segment)
        if self._build is None:
            return
        newest = (self._pushed - 1 - torch.arange(min(_SAMPLED, len(self)))) % self.capacity
        if self._build.work(rows, len(self), newest):
            self._lists = self._build.made
            assert self._lists is not None
            enough = self._build.enough_probes(self._target)
            self._probes = min(self._wanted_probes or enough, self._lists.lists)
            self._lists.complete(self._pushed % self.capacity)
            self._imbalance = self._lists.imbalance
            if self._exact:
                self._remade = self._pushed
            self._build, self._exact = None, False

    def _looks(self, count: int) -> bool:
        """Whether the last `count` entries are the first of an eighth of a rotation."""
        period = -(-self.capacity // _LOOKS)
        return self._pushed // period > (self._pushed - count) // period

    def _lopsided(self) -> bool:
        return self._lists is not None and self._lists.imbalance > _LOPSIDED * self._imbalance

    def _lists_due(self) -> int:
        """Lists that suit the entries by now."""
        filled = min(len(self), self._segment)
        if filled >= self._segment // _GROWTH and filled >= min(2 * self._wanted_lists, self._segment):
            return self._wanted_lists
        if filled < _FIRST:
            return 0
        stage = _FIRST
        while stage * _GROWTH <= filled:
            stage *= _GROWTH
        return min(_fitting_lists(stage), self._wanted_lists)

    def _index_state(self) -> dict[str, Tensor]:
        state = {
            "ivf": self._settings(),
            "counters": torch.tensor([self._probes, self._last, self._exact, self._remade]),
            "answered": self._answered,
            "imbalance": torch.tensor(self._imbalance, dtype=torch.float64),
        }
        if self._lists is not None:
            state |= {f"lists.{name}": value for name, value in self._lists.state().items()}
        if self._build is not None:
            state |= {f"build.{name}": value for name, value in self._build.state().items()}
        return state

    def _load_index(self, state: dict[str, Tensor]) -> None:
        self._reset()
        if "ivf" not in state or not torch.equal(state["ivf"], self._settings()):
            while self._lists is None and self._lists_due() > 0:
                self._make_lists(_BULK)
            return
        parts = {
            part: {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
            for part in ("lists", "build")
        }
        try:
            self._probes, self._last, exact, self._remade = state["counters"].tolist()
            self._exact, self._answered = bool(exact), state["answered"].clone()
            self._imbalance = float(state["imbalance"])
            if parts["lists"]:
                self._lists = SegmentedLists.restore(parts["lists"], self._entries, self._segment)
            if parts["build"]:
                self._build = IvfBuild.restore(parts["build"], self._entries, self._segment)
        except KeyError as error:
            raise ValueError(f"the saved lists of the bank are incomplete: {error} is missing") from error

    def _settings(self) -> Tensor:
        """What makes saved lists those of this bank, [3] int64."""
        return torch.tensor([self._wanted_lists, self._wanted_probes or 0, self._segment])


def _fitting_lists(entries: int) -> int:
    """About four times the root of `entries`, a power of two, with enough entries in each list."""
    return int(2 ** round(math.log2(max(1.0, min(4 * math.sqrt(entries), entries / _PER_LIST)))))
