"""The bank that is slow and obviously right: every query against every entry, in float64, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from msf_faiss.bank.ring import RingBank
from msf_faiss.search.canonical import canonical
from msf_faiss.search.neighbors import Neighbors


class ReferenceBank(RingBank):
    """Exact search without FAISS; also holds float64, for checks of the arithmetic of a step."""

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        live = torch.cat([torch.arange(start, stop, device=self.device) for start, stop in self._live()])
        every = live.expand(queries.shape[0], -1)  # [B, n]
        return canonical(queries, self._entries, every, self.age(every), k)
