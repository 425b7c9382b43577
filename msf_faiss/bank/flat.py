"""The exact bank: a ring that is searched in place.

Shapes: B queries, K neighbours, N slots, D dimensions.
"""

from torch import Tensor

from msf_faiss.bank.ring import RingBank, RingSpec
from msf_faiss.search.autotune import engines, time_engines
from msf_faiss.search.exact import Engine
from msf_faiss.search.neighbors import Neighbors


class FlatBank(RingBank):
    """Exact bank in float32, float16 or bfloat16.

    If more than 1,024 entries on the CPU, or 8 on CUDA, tie at the k-th place to within rounding, any of them may be
    returned (see `search_exactly`).

    Args:
        spec: size, dtype and device.
        engine: that proposes the candidates; None: the one that works on every machine.
    """

    def __init__(self, spec: RingSpec, *, engine: Engine | None = None) -> None:
        super().__init__(spec)
        self._engine = engine or self._engine

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, engine {self.engine})"

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self._engine.name

    def use_fastest_engine(self, *, batch: int, k: int) -> None:
        """Time all engines on this bank, which must be empty, and use the fastest; see `time_engines`."""
        assert self.pushed == 0, "timing overwrites the ring"
        self.engine_ms = time_engines(self._entries, batch, k)
        self._engine = engines(self.device)[next(iter(self.engine_ms))]

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        return self._search_exactly(queries, k)
