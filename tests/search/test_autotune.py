"""Timing of the engines."""

import pytest
import torch
from torch import Tensor

from msf_faiss.search import autotune
from msf_faiss.search.autotune import engines, time_engines
from msf_faiss.search.exact import Proposal
from msf_faiss.search.faiss_engines import FaissCpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("capacity", "batch", "k"), [(1, 3, 1), (5, 8, 5), (500, 40, 5), (70_000, 3, 2)])
def test_timing_leaves_an_empty_ring(capacity: int, batch: int, k: int, dtype: torch.dtype) -> None:
    ring = torch.zeros(capacity, 4, dtype=dtype)
    times = time_engines(ring, batch, k)
    assert ring.count_nonzero() == 0
    assert times.keys() == engines(torch.device("cpu")).keys()
    assert list(times.values()) == sorted(times.values())
    assert all(ms > 0 for ms in times.values())


def test_fastest_median_comes_first_without_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"a": [0.001, 0.02, 0.02, 0.02], "b": [9.0, 0.01, 0.01, 8.0]}
    now, calls = 0.0, {name: [] for name in seconds}

    class TimedEngine(FaissCpu):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def propose(self, queries: Tensor, rows: Tensor, count: int) -> Proposal:
            nonlocal now
            now += seconds[self.name][len(calls[self.name])]
            calls[self.name].append((*queries.shape, rows.shape[0], count))
            assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-2)
            return super().propose(queries, rows, count)

    monkeypatch.setattr(autotune, "engines", lambda device: {name: TimedEngine(name) for name in seconds})
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    assert time_engines(torch.zeros(70_000, 4), 30, 5) == {"b": pytest.approx(10), "a": pytest.approx(20)}
    # The shapes of a search, with the first 65,536 rows.
    assert calls["a"] == calls["b"] == [(30, 4, 65_536, 13)] * 4
