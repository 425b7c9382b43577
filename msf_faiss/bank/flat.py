"""The exact bank: nothing but the ring, searched in place.

Shapes: B queries, K neighbours, N rows, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msf_faiss.bank.ring import RingBank
from msf_faiss.search.autotune import engines, time_engines
from msf_faiss.search.exact import search_exactly
from msf_faiss.search.faiss_engines import default_engine
from msf_faiss.search.neighbors import Neighbors


class FlatBank(RingBank):
    """Exact FIFO bank in float32, float16 or bfloat16.

    Of entries that tie at the k-th place to within rounding and are more than 1,024 on the CPU, or more than 8 on CUDA,
    any may be returned (see `search_exactly`).

    Args:
        engine: one of `choice.engines(device)` by name; None: the one that is right everywhere.

    Raises:
        ValueError: if dtype is none of the three, or there is no such engine on the device.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        max_age: int | None = None,
        engine: str | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"a flat bank holds float32, float16 or bfloat16, found {dtype}")
        super().__init__(capacity, dim, dtype, device, max_age=max_age)
        known = engines(self.device)
        if engine is not None and engine not in known:
            raise ValueError(f"there is no engine {engine} on {self.device}; there are {', '.join(known)}")
        self._engine = default_engine(self.device) if engine is None else known[engine]
        self.engine_ms: dict[str, float] = {}  # milliseconds of a search by each engine, if they were timed

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, engine {self.engine})"

    @property
    def engine(self) -> str:
        """Name of the engine in use."""
        return self._engine.name

    def use_fastest_engine(self, *, batch: int, k: int) -> None:
        """Time the engines on an empty bank of this shape, and take the fastest; see `choice.time_engines`."""
        assert self.pushed == 0, "the ring is scratch while engines are timed"
        self.engine_ms = time_engines(self._entries, batch, k)
        self._engine = engines(self.device)[next(iter(self.engine_ms))]

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        return search_exactly(self._engine, queries, self._entries, self._live(), self.age, k)
