"""The approximate bank: inverted lists that are updated with every push.

Shapes: N slots, n filled slots, M pushed vectors, B queries, K neighbours, L lists, P probed lists, C candidates,
D dimensions.
"""

import math

import torch
from torch import Tensor

from msf_faiss.bank.ivf.build import IvfBuild
from msf_faiss.bank.ivf.segments import SegmentedLists
from msf_faiss.bank.ring import RingBank, RingSpec
from msf_faiss.search.canonical import merge, rescore
from msf_faiss.search.exact import MARGIN
from msf_faiss.search.neighbors import Neighbors

_GROWTH = 4  # times as many entries, after which twice as many lists are built
_PER_LIST = 32  # least entries per list
_WORK = 4  # rows that a build compares with all centroids for each pushed entry
_BULK = 65_536  # rows at a time where a build does not wait for pushes
_LOPSIDED = 3.0  # growth of the imbalance after which the lists are built again
_IMBALANCE_CHECKS = 8  # per rotation of the ring
_SAMPLED = 64  # queries with which a build measures how many lists must be probed
_WIDEST = 4  # probing more than a fourth of the lists is no faster than an exact search


class IvfBank(RingBank):
    """Approximate bank in CPU memory: an inverted file over the ring.

    A search finds the entries in the lists that a query probes, and compares the best of them exactly, in the ring; the
    entries of the last push are always compared. The first lists are built at `exact_below` entries, new ones at four
    times as many, and so on up to a quarter of a segment, a few rows at each push. Until there are lists, and where
    they lose too many neighbours, the search is exact. Loading a ring without its lists builds them at once. Lists that
    have become unequal, because the encoder left some of them behind, are replaced by new ones.

    Args:
        spec: size, dtype and device.
        lists: number of lists of each segment; None: about four times the square root of its capacity.
        probes: lists that a query probes in each segment at first; None: as many as a sample of queries needs.
        segments: parts of the ring with centroids of their own, see `SegmentedLists`.
        min_recall: recall that `probes=None` must reach, with a margin of half of what is missing to 1.
        exact_below: number of entries up to which the search is exact, because lists are no faster.
        margin: candidates beyond k that are rescored in float64.

    Raises:
        ValueError: if the dtype or device is not supported, or there are more lists or segments than entries.
    """

    cpu_only = True

    def __init__(
        self,
        spec: RingSpec,
        *,
        lists: int | None = None,
        probes: int | None = None,
        segments: int = 1,
        min_recall: float = 0.95,
        exact_below: int = 16_384,
        margin: int = MARGIN,
    ) -> None:
        super().__init__(spec)
        self._segment = -(-spec.capacity // segments)  # slots; the last segment may have fewer
        if segments > spec.capacity or (lists is not None and lists > self._segment):
            raise ValueError(
                f"ivf: {spec.capacity:,} entries are too few for {segments:,} segments of {lists or 1:,} lists"
            )
        self._wanted_lists = lists or _suitable_lists(self._segment)
        self._wanted_probes = probes
        self._target = (1 + min_recall) / 2
        self._exact_below, self._margin = exact_below, margin

    @staticmethod
    def extra_bytes(dim: int, dtype: torch.dtype) -> float:
        return 2 * (dim + 8) + 8  # code and id, in lists that double when they are full, and the entry's list

    def _allocate(self) -> None:
        self._lists: SegmentedLists | None = None
        self._build: IvfBuild | None = None
        self._probes = 0
        self._last_push = 0
        self._imbalance = math.inf  # of the lists when they were built
        self._exact = False  # whether to ignore the lists: until better ones are built, or for good
        self._rebuilt_at = -1  # entries pushed when lists were last rebuilt for their recall; -1: never
        self._answered = torch.zeros(2, dtype=torch.int64)  # queries answered exactly, and all, since the last metrics

    def __repr__(self) -> str:
        known = "no lists yet" if self._lists is None else f"{self._lists.lists:,} lists, {self._probes:,} probed"
        segments = -(-self.capacity // self._segment)
        return f"{super().__repr__()[:-1]}, {known}{f', {segments} segments' if segments > 1 else ''})"

    def _push(self, embeddings: Tensor, ids: Tensor) -> None:
        if embeddings.shape[0] >= self.capacity:  # replaces all entries, and so the lists
            self._exact &= self._build is None  # unless the search is exact for good
            self._lists = self._build = None
        if self._lists is not None:
            self._lists.follow()
        super()._push(embeddings, ids)
        if count := embeddings.shape[0]:
            self._last_push = min(count, self.capacity)
            self._continue_build(_WORK * count)

    def _written(self, start: int, stop: int) -> None:
        if self._lists is not None:
            self._lists.write(start, stop, self._probes)
        if self._build is not None:
            self._build.replace(start, stop)

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        self._answered[1] += queries.shape[0]
        if self._lists is None or self._exact:
            self._answered[0] += queries.shape[0]
            return self._search_exactly(queries, k)
        recent, count = min(self._last_push, self.searchable), k + self._margin
        similarities, slots = self._lists.search(queries, self._probes, count, self._live_slots())
        similarities.masked_fill_(self.age(slots) < recent, -torch.inf)  # these are searched exactly below
        if slots.shape[1] > count:
            similarities, places = similarities.topk(count, dim=1)
            slots = slots.gather(1, places)
        neighbors = rescore(queries, self._entries, slots, self.age(slots), count, valid=~similarities.isneginf())
        if recent:
            young = self._search_slots(queries, min(k, recent), self._slots(0, recent))
            neighbors = merge(young, neighbors, k)
        neighbors = Neighbors(*(each[:, :k].contiguous() for each in neighbors))
        few = neighbors.similarities[:, -1].isneginf()  # the probed lists have fewer than k entries
        if bool(few.any()):
            again = self._search_exactly(queries[few], k)
            neighbors.similarities[few], neighbors.slots[few] = again
            self._answered[0] += few.sum()
        return neighbors

    def raise_recall(self) -> str | None:
        if self._lists is None:
            return super().raise_recall()
        if 2 * self._probes <= self._lists.lists // _WIDEST:
            self._probes *= 2
            return f"a query probes {self._probes:,} of {self._lists.lists:,} lists from now on"
        self._exact = True
        if self._rebuilt_at < 0 or self._pushed - self._rebuilt_at >= self.capacity:
            self._build = IvfBuild(self._entries, len(self), self._lists.lists, self._segment)
            self._lists = None  # two sets of lists would exceed the memory of this bank
            return "the bank rebuilds its lists, and searches exactly until then"
        self._lists = None
        return "the rebuilt lists are no better, so the bank searches exactly from now on"

    def metrics(self) -> dict[str, float]:
        """Return `exact_ratio` of the queries since the last call, and of the lists `probes` and `list_imbalance`."""
        exact, queries = self._answered.tolist()
        self._answered.zero_()
        values = super().metrics() | ({"exact_ratio": exact / queries} if queries else {})
        if self._lists is not None:
            values |= {"probes": float(self._probes), "list_imbalance": self._lists.imbalance}
        return values

    def _continue_build(self, rows: int) -> None:
        """Start to build lists if the bank needs new ones, and compare `rows` more rows with their centroids."""
        have = self._lists.lists if self._lists is not None else 0
        exact_for_good = self._exact and self._lists is None and self._build is None
        if self._build is None and not exact_for_good:
            due = self._lists_due()
            if due > have or (due > 0 and self._checks_imbalance(rows // _WORK) and self._is_lopsided()):
                self._build = IvfBuild(self._entries, len(self), due, self._segment)
        if self._build is None:
            return
        newest = (self._pushed - 1 - torch.arange(min(_SAMPLED, len(self)))) % self.capacity
        if self._build.advance(rows, len(self), newest):
            self._lists = self._build.lists
            assert self._lists is not None
            enough = self._build.enough_probes(self._target)
            self._probes = min(self._wanted_probes or enough, self._lists.lists)
            self._lists.complete(self._pushed % self.capacity)
            self._imbalance = self._lists.imbalance
            if self._exact:
                self._rebuilt_at = self._pushed
            self._build, self._exact = None, False

    def _checks_imbalance(self, count: int) -> bool:
        """Whether the last `count` entries start a new eighth of a rotation."""
        period = -(-self.capacity // _IMBALANCE_CHECKS)
        return self._pushed // period > (self._pushed - count) // period

    def _is_lopsided(self) -> bool:
        return self._lists is not None and self._lists.imbalance > _LOPSIDED * self._imbalance

    def _lists_due(self) -> int:
        """Number of lists for the present number of entries."""
        filled = min(len(self), self._segment)
        if filled >= self._segment // _GROWTH and filled >= min(2 * self._wanted_lists, self._segment):
            return self._wanted_lists
        if filled < self._exact_below:
            return 0
        stage = self._exact_below
        while stage * _GROWTH <= filled:
            stage *= _GROWTH
        return min(_suitable_lists(stage), self._wanted_lists)

    def _index_state(self) -> dict[str, Tensor]:
        state = {
            "ivf": self._settings(),
            "counters": torch.tensor([self._probes, self._last_push, self._exact, self._rebuilt_at]),
            "answered": self._answered,
            "imbalance": torch.tensor(self._imbalance, dtype=torch.float64),
        }
        if self._lists is not None:
            state |= {f"lists.{name}": value for name, value in self._lists.state().items()}
        if self._build is not None:
            state |= {f"build.{name}": value for name, value in self._build.state().items()}
        return state

    def _load_index(self, state: dict[str, Tensor]) -> None:
        self._allocate()
        # Earlier versions let vectors that were not finite into the centroids, which never recovered.
        finite = all(value.isfinite().all() for name, value in state.items() if name.endswith(("centroids", "sums")))
        if "ivf" not in state or not torch.equal(state["ivf"], self._settings()) or not finite:
            while self._lists is None and self._lists_due() > 0:
                self._continue_build(_BULK)
            return
        parts = {
            part: {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
            for part in ("lists", "build")
        }
        try:
            self._probes, self._last_push, exact, self._rebuilt_at = state["counters"].tolist()
            self._exact, self._answered = bool(exact), state["answered"].clone()
            self._imbalance = float(state["imbalance"])
            if parts["lists"]:
                self._lists = SegmentedLists.restore(parts["lists"], self._entries, self._segment)
            if parts["build"]:
                self._build = IvfBuild.restore(parts["build"], self._entries, self._segment)
        except KeyError as error:
            raise ValueError(f"the saved lists of the bank are incomplete: {error} is missing") from error

    def _settings(self) -> Tensor:
        """What saved lists must have been built with, [3] int64."""
        return torch.tensor([self._wanted_lists, self._wanted_probes or 0, self._segment])


def _suitable_lists(entries: int) -> int:
    """Return about four times the square root of `entries`, a power of two, with enough entries per list."""
    return int(2 ** round(math.log2(max(1.0, min(4 * math.sqrt(entries), entries / _PER_LIST)))))
