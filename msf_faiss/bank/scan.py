"""Banks that scan a compressed copy of the ring, and compare the best of it exactly.

Shapes: B queries, C candidates, K neighbours, N slots, D dimensions.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.bank.base import Neighbors
from msf_faiss.bank.canonical import canonical, merged
from msf_faiss.bank.engines import default_engine
from msf_faiss.bank.exact import MARGIN, search_exactly, unproven
from msf_faiss.bank.faiss_setup import faiss
from msf_faiss.bank.ring import RingBank
from msf_faiss.bank.tiled import GROUP, compare, products, shortlist, unrounded

_NEWEST = 256  # entries pushed last that approximate banks search exactly, or all of the last push
_MOST_EFFORT = 8
_FEWEST = 16  # groups beyond k that are listed at first; twice as many each time that they were too few for a query,
_GROUPS = 128  # up to so many: listing more takes longer than what they prove saves
_GROUPS_CUDA = 64  # that are compared always
_UNSCANNED = 15  # searches without a scan after one that proved less than half
_INT8_RANGE = 4.0  # standard deviations of a mixed component that 127 stands for
_UNSURE = 1 / 64  # of int8's queries that may be left with too few groups
_INT8_SIGMAS = 6.0  # of the error of a product that are allowed for
_LEAST_ROWS = 17
_UNIT = 1 + 2.0**-8  # norm of a unit vector at most, after rounding to the ring's dtype
_PQ_PART = 6  # dimensions that a code of 4 bits stands for; 4 of them: recall .987 for .968 at 1M, a third slower
_PQ_SHORTLIST = 40  # entries compared exactly for each candidate wanted
_PQ_TRAINING = 4096  # entries: half a second; 16 times as many gain .004 of recall
_PQ_WORK = 8  # entries that are encoded by new code books for each pushed one
_PQ_BLOCK = 32  # codes that FAISS packs together
_PQ_MOST = 256  # neighbours, no more than `_NEWEST`, which fill up where a shortlist ends early
_ROWS = 1024  # encoded at a time: they stay in the cache


def create_scan_bank(
    scan: str, capacity: int, dim: int, dtype: torch.dtype, device: torch.device | str, *, max_age: int | None = None
) -> ScanBank:
    """The empty bank that scans the copy called `scan`: "bf16", "int8" or "pq".

    Raises:
        ValueError: if dtype is none of float32, float16 and bfloat16, or there is no such copy on `device`.
    """
    kinds: dict[str, type[ScanBank]] = {"bf16": Bf16ScanBank, "int8": Int8ScanBank, "pq": PqScanBank}
    return kinds[scan](capacity, dim, dtype, device, max_age=max_age)


def extra_bytes(scan: str, dim: int, dtype: torch.dtype) -> float:
    """Bytes that an entry takes beside its place in the ring."""
    match scan:
        case "bf16":
            return 0 if dtype == torch.bfloat16 else 2 * dim + 4
        case "int8":
            return _padded(dim, 8)
        case _:
            return _padded(dim, 2 * _PQ_PART) / (2 * _PQ_PART)


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
        for start in range(0, len(self), _ROWS):
            self._written(start, min(start + _ROWS, len(self)))


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

    def readings(self) -> dict[str, float]:
        """proved: share of the queries since the last reading whose neighbours the scan proved to be right."""
        proved, every = self._counts.tolist()
        self._counts.zero_()
        return {"proved": proved / every} if every else {}

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
            if self._groups < _GROUPS:
                self._next_groups = min(2 * self._groups, _GROUPS)
            elif 2 * count > queries.shape[0]:
                self._unscanned = _UNSCANNED
        return found


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

    def improve(self) -> str:
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


class Int8ScanBank(ApproximateScanBank):
    """Approximate: scans a copy in 8-bit integers, in half the time and memory of bfloat16, and hardly ever wrong.

    A copy is mixed first (see `_mixed`), after which one scale suits all components of all entries: their products
    remain integers until the best are known. Groups of entries are compared, best first, until a query's k-th neighbour
    is above all others by six standard deviations of what rounding does to a product.
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
        self._signs = _signs(dim).to(self.device)  # [2, D]
        self._scale = 127 / _INT8_RANGE * dim**0.5
        # CUDA's product takes at least 17 rows, and 8 dimensions at a time.
        self._codes = torch.zeros(capacity + _LEAST_ROWS, _padded(dim, 8), dtype=torch.int8, device=self.device)

    def _written(self, start: int, stop: int) -> None:
        self._codes[start:stop, : self.dim] = self._encode(self._entries[start:stop])

    def _index_state(self) -> dict[str, Tensor]:
        return {"int8.counters": torch.tensor([self._effort, self._last_push, self._groups, self._next_groups])}

    def _load_index(self, state: dict[str, Tensor]) -> None:
        self._encode_all()
        self._effort, self._last_push, *groups = state.get("int8.counters", torch.tensor([1, 0, 0, 0])).tolist()
        self._groups, self._next_groups = (max(number, self._fewest) for number in groups)

    def _encode(self, vectors: Tensor) -> Tensor:
        """[*, D] int8."""
        return _mixed(vectors.float(), self._signs).mul_(self._scale).round_().clamp_(-127, 127).to(torch.int8)

    def _older(self, queries: Tensor, k: int, newest: int) -> Neighbors:
        batch = queries.shape[0]
        coarse = self._codes.new_zeros(_padded(batch, 8), self._codes.shape[1])
        coarse[:batch, : self.dim] = self._encode(queries)

        def product(start: int, stop: int, out: Tensor) -> None:
            if stop - start < _LEAST_ROWS:
                out.copy_(torch._int_mm(self._codes[start : start + _LEAST_ROWS], coarse.T)[: stop - start])
            else:
                torch._int_mm(self._codes[start:stop], coarse.T, out=out)

        groups = self._effort * self._groups
        listed = shortlist(product, torch.int32, self._aged(newest, self.searchable), k + groups, coarse)
        bounds = torch.cat([listed.maxima, listed.bound.unsqueeze(1)], dim=1)[:batch].float() / self._scale**2
        # Rounding to whole numbers deviates by 12 ** -0.5 in each component, of the query and of the entry.
        error = _INT8_SIGMAS * (2 / 12) ** 0.5 / self._scale
        slots, bound = self._compare(queries, listed.rows[:batch], bounds, k, error)
        found = canonical(queries, self._entries, slots, self.age(slots), slots.shape[1])
        if self._groups < _GROUPS and not queries.is_cuda:
            kth = found.similarities[:, min(k, slots.shape[1]) - 1]
            if unproven(kth, bound, error).double().mean() > _UNSURE:
                self._next_groups = min(2 * self._groups, _GROUPS)
        return found


class PqScanBank(ApproximateScanBank):
    """Approximate: scans codes of 4 bits for every 6 dimensions by FAISS's fast scan, on the CPU only.

    Code books are learnt when there are 4,096 entries and each time that there are 4 times as many, until the ring is
    full; all entries are encoded anew while pushes go on, a few at each. Until there are any codes, and where fewer
    than a quarter of the entries may be found (max_age), the search is exact.

    Raises:
        ValueError: if `device` is not the CPU.
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
        if torch.device(device).type != "cpu":
            raise ValueError(f"the pq scan runs on the CPU only; on {device} choose bf16 or int8")
        super().__init__(capacity, dim, dtype, device, max_age=max_age)
        self._width = _padded(dim, _PQ_PART)
        self._codes: _PqCodes | None = None  # of all entries
        self._coming: _PqCodes | None = None  # by newer code books, of some entries yet
        self._trained_at = 0  # entries pushed by then

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        super().push(embeddings, ids)
        if len(self) >= _PQ_TRAINING and self._pushed >= 4 * self._trained_at and self._trained_at < self.capacity:
            self._train()
        self._encode_more(_PQ_WORK * embeddings.shape[0])

    def improve(self) -> str:
        if self._codes is not None and self._pushed - self._trained_at >= self.capacity // 2:
            self._train()
            return "code books are learnt anew"
        return super().improve()

    def _train(self) -> None:
        chosen = torch.linspace(0, len(self) - 1, _PQ_TRAINING).long()
        index = self._new_index()
        index.train(_padded_rows(self._entries[chosen], self._width))
        self._coming = _PqCodes(self._entries, index)
        self._trained_at = self._pushed

    def _encode_more(self, rows: int) -> None:
        if self._coming is None:
            return
        stop = min(self._coming.covered + rows, len(self))
        self._coming.extend(stop)
        if stop == len(self):
            self._codes, self._coming = self._coming, None

    def _new_index(self) -> Any:
        return faiss.IndexPQFastScan(self._width, self._width // _PQ_PART, 4, faiss.METRIC_INNER_PRODUCT, _PQ_BLOCK)

    def _written(self, start: int, stop: int) -> None:
        if self._codes is not None:
            self._codes.encode(start, stop)
        if self._coming is not None and start < self._coming.covered:
            self._coming.encode(start, min(stop, self._coming.covered))

    def _index_state(self) -> dict[str, Tensor]:
        state = {"pq.counters": torch.tensor([self._effort, self._trained_at, self._last_push])}
        for name, codes in (("codes", self._codes), ("coming", self._coming)):
            if codes is not None:
                state[f"pq.{name}.books"] = torch.from_numpy(codes.books)
                state[f"pq.{name}.covered"] = torch.tensor(codes.covered)
        return state

    def _load_index(self, state: dict[str, Tensor]) -> None:
        counters = state.get("pq.counters", torch.tensor([1, 0, 0]))
        self._effort, self._trained_at, self._last_push = counters.tolist()
        self._codes, self._coming = self._restored(state, "codes"), self._restored(state, "coming")
        if self._codes is None and self._coming is None and len(self) >= _PQ_TRAINING:
            self._train()
            self._encode_more(len(self))

    def _restored(self, state: dict[str, Tensor], name: str) -> _PqCodes | None:
        if f"pq.{name}.books" not in state:
            return None
        index = self._new_index()
        faiss.copy_array_to_vector(state[f"pq.{name}.books"].numpy(), index.pq.centroids)
        index.is_trained = True
        codes = _PqCodes(self._entries, index)
        codes.extend(int(state[f"pq.{name}.covered"]))
        return codes

    def _can_scan(self, k: int) -> bool:
        # The newest fill up where FAISS's list ends early, or names entries that are too old.
        return self._codes is not None and k <= _PQ_MOST and 4 * self.searchable >= len(self)

    def _older(self, queries: Tensor, k: int, newest: int) -> Neighbors:
        assert self._codes is not None, "see _can_scan"
        wanted = self._effort * _PQ_SHORTLIST * (k + MARGIN) * len(self) // self.searchable
        slots = self._codes.search(queries, min(wanted, len(self)))  # [B, C]
        slots = torch.where(slots >= 0, slots, (self._pushed - 1) % self.capacity)
        similarities = compare(queries, self._entries, slots).masked_fill_(self._outside(slots, newest), -torch.inf)
        best = similarities.topk(min(k + MARGIN, slots.shape[1]), dim=1).indices
        slots = slots.gather(1, best)
        found = canonical(queries, self._entries, slots, self.age(slots), slots.shape[1])
        found.similarities.masked_fill_(self._outside(found.slots, newest), -torch.inf)
        return found

    def _outside(self, slots: Tensor, newest: int) -> Tensor:
        ages = self.age(slots)
        return (ages < newest) | (ages >= self.searchable)


class _PqCodes:
    """Codes of the slots [0, `covered`) of a ring, in FAISS's blocks of 32.

    Args:
        entries: the ring, [N, D]; read.
        index: FAISS's, with code books and empty; kept.
    """

    def __init__(self, entries: Tensor, index: Any) -> None:
        self._entries, self._index = entries, index
        self._packer = faiss.clone_index(index)  # stays empty but for what is being encoded
        blocks, stride = -(-entries.shape[0] // _PQ_BLOCK), index.get_block_stride()
        index.codes.resize(blocks * stride)
        index.implem = 15  # one query after the other: the fastest with long shortlists
        self._blocks: NDArray[np.uint8] = faiss.rev_swig_ptr(index.codes.get(), blocks * stride).reshape(blocks, stride)
        self._blocks[:] = 0
        self.covered = 0

    @property
    def books(self) -> NDArray[np.float32]:
        """A copy of the code books."""
        found: NDArray[np.float32] = faiss.vector_to_array(self._index.pq.centroids)
        return found

    def extend(self, stop: int) -> None:
        """Cover the slots up to `stop` too."""
        while self.covered < stop:
            self.encode(self.covered, min(self.covered + _ROWS, stop))

    def encode(self, start: int, stop: int) -> None:
        """The slots [start, stop) hold new entries; `start` is at most `covered`."""
        self.covered = max(self.covered, stop)
        first, last = start // _PQ_BLOCK, -(-stop // _PQ_BLOCK)
        rows = self._entries[first * _PQ_BLOCK : min(last * _PQ_BLOCK, self.covered)]
        # `remove_ids` and `add` on the index itself would leave bits of the old codes behind.
        self._packer.reset()
        self._packer.add(_padded_rows(rows, self._index.d))
        packed = faiss.rev_swig_ptr(self._packer.codes.get(), self._blocks[first:last].size)
        self._blocks[first:last] = packed.reshape(last - first, -1)
        self._index.ntotal = self.covered
        self._index.ntotal2 = _padded(self.covered, _PQ_BLOCK)

    def search(self, queries: Tensor, count: int) -> Tensor:
        """The slots that seem nearest to `queries` [B, D]: [B, count], -1 where the list ends early."""
        vectors = _padded_rows(queries.nan_to_num(), self._index.d)
        return torch.from_numpy(self._index.search(vectors, count)[1])


def _padded_rows(vectors: Tensor, width: int) -> NDArray[np.float32]:
    """`vectors` [*, D] and zeros up to `width`, for FAISS."""
    padded = torch.nn.functional.pad(vectors.float(), (0, width - vectors.shape[1]))
    found: NDArray[np.float32] = padded.contiguous().numpy()
    return found


def _mixed(vectors: Tensor, signs: Tensor) -> Tensor:
    """An orthogonal transform that gives all components of any vector about the same variance, 1/D: [*, D].

    Two Walsh-Hadamard transforms of random signs, of the first and of the last dimensions, so that any D will do.
    Nothing but sums of pairs: its bits do not depend on how many vectors are transformed at a time.
    """
    dim = vectors.shape[1]
    width = 1 << (dim.bit_length() - 1)
    first = torch.cat([_walsh_hadamard(vectors[:, :width] * signs[0, :width]), vectors[:, width:]], dim=1) * signs[1]
    return torch.cat([first[:, : dim - width], _walsh_hadamard(first[:, dim - width :])], dim=1)


def _walsh_hadamard(vectors: Tensor) -> Tensor:
    width = vectors.shape[1]
    for _ in range(width.bit_length() - 1):
        even, odd = vectors[:, 0::2], vectors[:, 1::2]
        vectors = torch.cat([even + odd, even - odd], dim=1)
    return vectors * float(width**-0.5)


def _signs(dim: int) -> Tensor:
    """[2, D] of 1 and -1, always the same."""
    drawn = torch.rand(2, dim, generator=torch.Generator().manual_seed(0))
    return torch.where(drawn < 0.5, -1.0, 1.0)


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
