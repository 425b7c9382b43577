"""Approximate search by FAISS's fast scan of product-quantized codes.

Shapes: B queries, C candidates, K neighbours, N slots, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.bank.scan.base import ROWS, ApproximateScanBank, padded
from msf_faiss.search.canonical import canonical
from msf_faiss.search.exact import MARGIN
from msf_faiss.search.faiss_setup import faiss
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.search.torch_engine import compare

PART = 6  # dimensions that a code of 4 bits stands for; 4 of them: recall .987 for .968 at 1M, a third slower
_SHORTLIST = 40  # entries compared exactly for each candidate wanted
_TRAINING = 4096  # entries: half a second; 16 times as many gain .004 of recall
_WORK = 8  # entries that are encoded by new code books for each pushed one
_BLOCK = 32  # codes that FAISS packs together
_MOST = 256  # neighbours, no more than `_NEWEST`, which fill up where a shortlist ends early


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
        self._width = padded(dim, PART)
        self._codes: _PqCodes | None = None  # of all entries
        self._coming: _PqCodes | None = None  # by newer code books, of some entries yet
        self._trained_at = 0  # entries pushed by then

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        super().push(embeddings, ids)
        if len(self) >= _TRAINING and self._pushed >= 4 * self._trained_at and self._trained_at < self.capacity:
            self._train()
        self._encode_more(_WORK * embeddings.shape[0])

    def raise_recall(self) -> str:
        if self._codes is not None and self._pushed - self._trained_at >= self.capacity // 2:
            self._train()
            return "code books are learnt anew"
        return super().raise_recall()

    def _train(self) -> None:
        chosen = torch.linspace(0, len(self) - 1, _TRAINING).long()
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
        return faiss.IndexPQFastScan(self._width, self._width // PART, 4, faiss.METRIC_INNER_PRODUCT, _BLOCK)

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
        if self._codes is None and self._coming is None and len(self) >= _TRAINING:
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
        return self._codes is not None and k <= _MOST and 4 * self.searchable >= len(self)

    def _older(self, queries: Tensor, k: int, newest: int) -> Neighbors:
        assert self._codes is not None, "see _can_scan"
        wanted = self._effort * _SHORTLIST * (k + MARGIN) * len(self) // self.searchable
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
        blocks, stride = -(-entries.shape[0] // _BLOCK), index.get_block_stride()
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
            self.encode(self.covered, min(self.covered + ROWS, stop))

    def encode(self, start: int, stop: int) -> None:
        """The slots [start, stop) hold new entries; `start` is at most `covered`."""
        self.covered = max(self.covered, stop)
        first, last = start // _BLOCK, -(-stop // _BLOCK)
        rows = self._entries[first * _BLOCK : min(last * _BLOCK, self.covered)]
        # `remove_ids` and `add` on the index itself would leave bits of the old codes behind.
        self._packer.reset()
        self._packer.add(_padded_rows(rows, self._index.d))
        packed = faiss.rev_swig_ptr(self._packer.codes.get(), self._blocks[first:last].size)
        self._blocks[first:last] = packed.reshape(last - first, -1)
        self._index.ntotal = self.covered
        self._index.ntotal2 = padded(self.covered, _BLOCK)

    def search(self, queries: Tensor, count: int) -> Tensor:
        """The slots that seem nearest to `queries` [B, D]: [B, count], -1 where the list ends early."""
        vectors = _padded_rows(queries.nan_to_num(), self._index.d)
        return torch.from_numpy(self._index.search(vectors, count)[1])


def _padded_rows(vectors: Tensor, width: int) -> NDArray[np.float32]:
    """`vectors` [*, D] and zeros up to `width`, for FAISS."""
    padded = torch.nn.functional.pad(vectors.float(), (0, width - vectors.shape[1]))
    found: NDArray[np.float32] = padded.contiguous().numpy()
    return found
