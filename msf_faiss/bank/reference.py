"""The bank that is slow and obviously right: every query against every entry, in float64, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from msf_faiss.bank.base import Neighbors
from msf_faiss.bank.canonical import canonical
from msf_faiss.bank.ring import RingBank


class ReferenceBank(RingBank):
    """Exact search without FAISS; also holds float64, for checks of the arithmetic of a step."""

    def search(self, queries: Tensor, k: int) -> Neighbors:
        queries = self._queries(queries, k)
        filled = torch.arange(len(self), device=self.device)
        every = filled.expand(queries.shape[0], -1)  # [B, n]
        return canonical(queries, self._entries, every, self.age(every), min(k, len(self)))
