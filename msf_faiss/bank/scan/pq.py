"""Approximate search by FAISS's fast scan of product-quantized codes.

Shapes: B queries, C candidates, K neighbours, N slots, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.bank.scan.base import ENCODED_ROWS, ApproximateScanBank, round_up
from msf_faiss.search.canonical import rescore
from msf_faiss.search.faiss_setup import faiss
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.search.torch_engine import compare

_PART = 6  # dimensions of a 4-bit code; 4 dimensions: recall .987 instead of .968 with 1M entries, a third slower
_SHORTLIST = 40  # entries compared exactly for each candidate
_WORK = 8  # entries encoded with new code books for each pushed entry
_BLOCK = 32  # codes that FAISS packs together


class PqScanBank(ApproximateScanBank):
    """Approximate: scans 4-bit codes of 6 dimensions each with FAISS's fast scan, on the CPU only.

    Code books are trained at 4,096 entries, and again whenever there are 4 times as many, until the ring is full. Each
    push then encodes a few entries with the new books. The search is exact until all entries have codes, and where
    `max_age` excludes more than three quarters of the entries.
    """

    cpu_only = True

    @staticmethod
    def extra_bytes(dim: int, dtype: torch.dtype) -> float:
        return round_up(dim, 2 * _PART) / (2 * _PART)

    def _allocate(self) -> None:
        super()._allocate()
        self._width = round_up(self.dim, _PART)
        self._codes: _PqCodes | None = None  # of all entries
        self._next_codes: _PqCodes | None = None  # with newer code books, of some of the entries
        self._trained_at = 0  # entries pushed when the code books were trained

    def _push(self, embeddings: Tensor, ids: Tensor) -> None:
        super()._push(embeddings, ids)
        enough = len(self) >= self._limits.training
        if enough and self._pushed >= 4 * self._trained_at and self._trained_at < self.capacity:
            self._train()
        self._encode_more(_WORK * embeddings.shape[0])

    def raise_recall(self) -> str | None:
        if self._codes is not None and self._next_codes is not None:
            return None
        if self._codes is not None and self._pushed - self._trained_at >= self.capacity // 2:
            self._train()
            return "the bank trains its code books again"
        return super().raise_recall()

    def _train(self) -> None:
        chosen = torch.linspace(0, len(self) - 1, self._limits.training).long()
        index = self._new_index()
        index.train(_pad(self._entries[chosen], self._width))
        self._next_codes = _PqCodes(self._entries, index)
        self._trained_at = self._pushed

    def _encode_more(self, rows: int) -> None:
        if self._next_codes is None:
            return
        stop = min(self._next_codes.covered + rows, len(self))
        self._next_codes.extend(stop)
        if stop == len(self):
            self._codes, self._next_codes = self._next_codes, None

    def _new_index(self) -> Any:
        return faiss.IndexPQFastScan(self._width, self._width // _PART, 4, faiss.METRIC_INNER_PRODUCT, _BLOCK)

    def _written(self, start: int, stop: int) -> None:
        if self._codes is not None:
            self._codes.encode(start, stop)
        if self._next_codes is not None and start < self._next_codes.covered:
            self._next_codes.encode(start, min(stop, self._next_codes.covered))

    def _index_state(self) -> dict[str, Tensor]:
        state = {"pq.counters": torch.tensor([self._effort, self._trained_at, self._last_push])}
        for name, codes in (("codes", self._codes), ("coming", self._next_codes)):
            if codes is not None:
                state[f"pq.{name}.books"] = torch.from_numpy(codes.books)
                state[f"pq.{name}.covered"] = torch.tensor(codes.covered)
        return state

    def _load_index(self, state: dict[str, Tensor]) -> None:
        counters = state.get("pq.counters", torch.tensor([1, 0, 0]))
        self._effort, self._trained_at, self._last_push = counters.tolist()
        self._codes, self._next_codes = self._restore(state, "codes"), self._restore(state, "coming")
        if self._codes is None and self._next_codes is None and len(self) >= self._limits.training:
            self._train()
            self._encode_more(len(self))

    def _restore(self, state: dict[str, Tensor], name: str) -> _PqCodes | None:
        if f"pq.{name}.books" not in state:
            return None
        index = self._new_index()
        faiss.copy_array_to_vector(state[f"pq.{name}.books"].numpy(), index.pq.centroids)
        index.is_trained = True
        codes = _PqCodes(self._entries, index)
        codes.extend(int(state[f"pq.{name}.covered"]))
        return codes

    def _can_scan(self, k: int) -> bool:
        # FAISS's list may end early or include entries that are too old; the newest entries then fill the result.
        return self._codes is not None and k <= self._limits.newest and 4 * self.searchable >= len(self)

    def _scan(self, queries: Tensor, k: int, newest: int) -> Neighbors:
        assert self._codes is not None, "see _can_scan"
        candidates = k + self._limits.margin
        wanted = self._effort * _SHORTLIST * candidates * len(self) // self.searchable
        slots = self._codes.search(queries, min(wanted, len(self)))  # [B, C]
        slots = torch.where(slots >= 0, slots, (self._pushed - 1) % self.capacity)
        similarities = compare(queries, self._entries, slots).masked_fill_(self._outside(slots, newest), -torch.inf)
        best = similarities.topk(min(candidates, slots.shape[1]), dim=1).indices
        slots = slots.gather(1, best)
        neighbors = rescore(queries, self._entries, slots, self.age(slots), slots.shape[1])
        neighbors.similarities.masked_fill_(self._outside(neighbors.slots, newest), -torch.inf)
        return neighbors

    def _outside(self, slots: Tensor, newest: int) -> Tensor:
        ages = self.age(slots)
        return (ages < newest) | (ages >= self.searchable)


class _PqCodes:
    """Codes of the slots [0, `covered`) of a ring, in FAISS's blocks of 32.

    Args:
        entries: the ring, [N, D]; never written.
        index: of FAISS, trained and empty; becomes part of this object.
    """

    def __init__(self, entries: Tensor, index: Any) -> None:
        self._entries, self._index = entries, index
        self._packer = faiss.clone_index(index)  # encodes a few rows at a time
        blocks, stride = -(-entries.shape[0] // _BLOCK), index.get_block_stride()
        index.codes.resize(blocks * stride)
        index.implem = 15  # query by query, the fastest for long shortlists
        self._blocks: NDArray[np.uint8] = faiss.rev_swig_ptr(index.codes.get(), blocks * stride).reshape(blocks, stride)
        self._blocks[:] = 0
        self.covered = 0

    @property
    def books(self) -> NDArray[np.float32]:
        """A copy of the code books."""
        books: NDArray[np.float32] = faiss.vector_to_array(self._index.pq.centroids)
        return books

    def extend(self, stop: int) -> None:
        """Encode the slots from `covered` to `stop`."""
        while self.covered < stop:
            self.encode(self.covered, min(self.covered + ENCODED_ROWS, stop))

    def encode(self, start: int, stop: int) -> None:
        """Encode the entries in the slots [start, stop), `start` <= `covered`."""
        self.covered = max(self.covered, stop)
        first, last = start // _BLOCK, -(-stop // _BLOCK)
        rows = self._entries[first * _BLOCK : min(last * _BLOCK, self.covered)]
        # FAISS's own `remove_ids` and `add` corrupt packed codes: they leave bits of the old ones behind.
        self._packer.reset()
        self._packer.add(_pad(rows, self._index.d))
        packed = faiss.rev_swig_ptr(self._packer.codes.get(), self._blocks[first:last].size)
        self._blocks[first:last] = packed.reshape(last - first, -1)
        self._index.ntotal = self.covered
        self._index.ntotal2 = round_up(self.covered, _BLOCK)

    def search(self, queries: Tensor, count: int) -> Tensor:
        """Return the slots [B, count] whose codes are nearest to `queries` [B, D], -1 where FAISS's list ends early."""
        vectors = _pad(queries, self._index.d)
        return torch.from_numpy(self._index.search(vectors, count)[1])


def _pad(vectors: Tensor, width: int) -> NDArray[np.float32]:
    """Return `vectors` [*, D] with zeros up to `width` columns."""
    padded: NDArray[np.float32] = (
        torch.nn.functional.pad(vectors.float(), (0, width - vectors.shape[1])).contiguous().numpy()
    )
    return padded
