"""The slow bank that the others are tested against: every query against every entry, in float64, in plain torch."""

import torch
from torch import Tensor

from msf_faiss.bank.ring import RingBank
from msf_faiss.search.canonical import rescore
from msf_faiss.search.neighbors import Neighbors


class ReferenceBank(RingBank):
    """Exact search without FAISS. Also stores float64, to test the arithmetic of a training step."""

    dtypes = (*RingBank.dtypes, torch.float64)

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        live = torch.cat([torch.arange(start, stop, device=self.device) for start, stop in self._live_slots()])
        every = live.expand(queries.shape[0], -1)  # [B, n]
        return rescore(queries, self._entries, every, self.age(every), k)

    _search_exactly = _search
