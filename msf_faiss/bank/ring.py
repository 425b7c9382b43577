"""Storage of a bank: a preallocated ring of vectors, their ids, and one counter.

Shapes: N capacity, n filled slots, M pushed vectors, B queries, K neighbours, D dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from msf_faiss.bank.base import Neighbors


class RingBank(ABC):
    """All of the `Bank` protocol but the search: entry number s (counted from 0) lies in slot s mod N.

    Raises:
        ValueError: if capacity or dim is below 1 or dtype is no floating dtype.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if capacity < 1 or dim < 1:
            raise ValueError(f"a bank needs capacity and dim of at least 1, found {capacity} and {dim}")
        if not dtype.is_floating_point:
            raise ValueError(f"a bank holds floating-point vectors, found {dtype}")
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
        self._check_vectors(embeddings, "embeddings")
        if ids.shape != embeddings.shape[:1] or ids.dtype != torch.int64 or ids.device != self.device:
            raise ValueError(
                f"ids must be [{embeddings.shape[0]}] int64 on {self.device}, "
                f"found {list(ids.shape)} {ids.dtype} on {ids.device}"
            )
        self._pushed += embeddings.shape[0]
        kept = min(embeddings.shape[0], self.capacity)
        self._write(embeddings.detach()[embeddings.shape[0] - kept :], ids[ids.shape[0] - kept :])

    @abstractmethod
    def search(self, queries: Tensor, k: int) -> Neighbors: ...

    def mean_of(self, slots: Tensor) -> Tensor:
        return self.reconstruct(slots).mean(dim=1)  # [B, K, D] -> [B, D]

    def reconstruct(self, slots: Tensor) -> Tensor:
        entries = self._entries[slots]  # [..., D]
        return entries if self.dtype == torch.float64 else entries.float()

    def ids(self, slots: Tensor) -> Tensor:
        return self._ids[slots]

    def age(self, slots: Tensor) -> Tensor:
        return (self._pushed - 1 - slots) % self.capacity

    def state_dict(self) -> dict[str, Tensor]:
        filled = len(self)
        return {
            "embeddings": self._entries[:filled],
            "ids": self._ids[:filled],
            "pushed": torch.tensor(self._pushed),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if set(state) != {"embeddings", "ids", "pushed"}:
            raise ValueError(f"not the state of a bank: its keys are {sorted(state)}")
        entries, ids, pushed = state["embeddings"], state["ids"], int(state["pushed"])
        if entries.ndim != 2 or entries.shape[1] != self.dim:
            raise ValueError(
                f"the saved bank has entries of shape {list(entries.shape)}, this one holds [n, {self.dim}]"
            )
        filled = entries.shape[0]
        if ids.shape != (filled,) or filled > pushed:
            raise ValueError(
                f"the saved bank is inconsistent: {filled} entries, {list(ids.shape)} ids, {pushed} pushed"
            )
        kept = min(filled, self.capacity)
        oldest_first = torch.arange(pushed - kept, pushed, device=entries.device) % max(filled, 1)
        # One counter tells the fill too, so a bank that grows while full starts its count anew.
        self._pushed = pushed if kept == min(pushed, self.capacity) else kept
        self._entries.zero_()
        self._ids.zero_()
        self._write(entries[oldest_first].to(self.device), ids[oldest_first].to(self.device))

    def _write(self, embeddings: Tensor, ids: Tensor) -> None:
        """Put at most N vectors into the slots that end at the newest, in one or two contiguous pieces."""
        count = embeddings.shape[0]
        start = (self._pushed - count) % self.capacity
        before_wrap = min(count, self.capacity - start)
        self._entries[start : start + before_wrap].copy_(embeddings[:before_wrap])
        self._ids[start : start + before_wrap].copy_(ids[:before_wrap])
        self._entries[: count - before_wrap].copy_(embeddings[before_wrap:])
        self._ids[: count - before_wrap].copy_(ids[before_wrap:])

    def _queries(self, queries: Tensor, k: int) -> Tensor:
        """Checked queries as the ring would store them: [B, D], in the bank's dtype, contiguous."""
        self._check_vectors(queries, "queries")
        if k < 1:
            raise ValueError(f"k must be at least 1, found {k}")
        return queries.detach().to(self.dtype).contiguous()

    def _check_vectors(self, vectors: Tensor, what: str) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"{what} must be [*, {self.dim}], found {list(vectors.shape)}")
        if not vectors.dtype.is_floating_point:
            raise ValueError(f"{what} must be floating point, found {vectors.dtype}")
        if vectors.device != self.device:
            raise ValueError(f"{what} are on {vectors.device}, the bank is on {self.device}")
