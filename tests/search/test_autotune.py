"""How the fastest exact engine is found, and what that leaves behind."""

import pytest
import torch
from torch import Tensor

from msf_faiss.bank import FlatBank, ReferenceBank, create_bank
from msf_faiss.config import FlatBankConfig
from msf_faiss.search import autotune as choice
from msf_faiss.search.autotune import engines, time_engines
from msf_faiss.search.exact import Proposal
from msf_faiss.search.faiss_engines import FaissCpu
from msf_faiss.search.faiss_setup import has_gpu

CPU = torch.device("cpu")


def unit(rows: int, dim: int = 16) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)), dim=1)


def take_turns(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]]) -> dict[str, list[tuple[int, ...]]]:
    """Replace the engines by ones that take so many seconds at each call, and remember the shapes of the calls."""
    now, calls = 0.0, {name: [] for name in seconds}

    class Timed(FaissCpu):
        def __init__(self, name: str) -> None:
            self.name = name

        def propose(self, queries: Tensor, rows: Tensor, count: int) -> Proposal:
            nonlocal now
            now += seconds[self.name][len(calls[self.name])]
            calls[self.name].append((*queries.shape, rows.shape[0], count))
            assert torch.allclose(rows.float().norm(dim=1), torch.ones(len(rows)), atol=1e-2)  # 16-bit rows too
            return super().propose(queries, rows, count)

    monkeypatch.setattr(choice, "engines", lambda device: {name: Timed(name) for name in seconds})
    monkeypatch.setattr("msf_faiss.bank.flat.engines", choice.engines)
    monkeypatch.setattr(choice.time, "perf_counter", lambda: now)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("capacity", "batch", "k"), [(1, 3, 1), (5, 8, 5), (500, 40, 5), (70_000, 3, 2)])
def test_the_scratch_ring_is_empty_afterwards(capacity: int, batch: int, k: int, dtype: torch.dtype) -> None:
    ring = torch.zeros(capacity, 4, dtype=dtype)
    times = time_engines(ring, batch, k)
    assert ring.count_nonzero() == 0
    assert times.keys() == engines(CPU).keys()
    assert list(times.values()) == sorted(times.values())
    assert all(ms > 0 for ms in times.values())


def test_the_fastest_by_the_median_is_first_and_the_first_round_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = take_turns(monkeypatch, {"a": [0.001, 0.02, 0.02, 0.02], "b": [9.0, 0.01, 0.01, 8.0]})
    assert time_engines(torch.zeros(70_000, 4), 30, 5) == {"b": pytest.approx(10), "a": pytest.approx(20)}
    # The shapes of a real search, but for the rows beyond the first 65,536.
    assert calls["a"] == calls["b"] == [(30, 4, 65_536, 13)] * 4


def test_a_bank_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    take_turns(monkeypatch, {"slow": [0.2] * 4, "quick": [0.1] * 5})
    bank = FlatBank(50, 16)
    bank.use_fastest_engine(batch=8, k=3)
    assert bank.engine == "quick"
    assert list(bank.engine_ms) == ["quick", "slow"]
    assert "engine quick" in repr(bank)
    assert (len(bank), bank.pushed) == (0, 0)
    exact = ReferenceBank(50, 16)
    for each in (bank, exact):
        each.push(unit(30), torch.arange(30))
    assert torch.equal(bank.search(unit(9), 4).slots, exact.search(unit(9), 4).slots)


def test_a_bank_that_holds_something_is_not_timed() -> None:
    bank = FlatBank(50, 16)
    bank.push(unit(3), torch.arange(3))
    with pytest.raises(AssertionError, match="scratch"):
        bank.use_fastest_engine(batch=8, k=3)
    assert torch.equal(bank.reconstruct(torch.arange(3)), unit(3))


@pytest.mark.parametrize("engine", [None, "faiss", "torch"])
def test_an_engine_can_be_chosen_by_name(engine: str | None) -> None:
    bank = FlatBank(50, 16, engine=engine)
    assert bank.engine == (engine or "faiss")
    assert bank.engine_ms == {}


def test_an_engine_that_does_not_exist_here_is_named() -> None:
    with pytest.raises(ValueError, match="there is no engine streams on cpu; there are faiss, torch"):
        FlatBank(50, 16, engine="streams")
    with pytest.raises(ValueError, match="there is no engine streams on cpu"):
        create_bank(FlatBankConfig(capacity=50, engine="streams"), dim=16, device=CPU)


def test_auto_times_the_engines_only_where_the_batch_is_known() -> None:
    config = FlatBankConfig(capacity=50, k=3)
    timed = create_bank(config, dim=16, device=CPU, batch=8)
    untimed = create_bank(config, dim=16, device=CPU)
    named = create_bank(FlatBankConfig(capacity=50, k=3, engine="torch"), dim=16, device=CPU, batch=8)
    assert isinstance(timed, FlatBank)
    assert isinstance(untimed, FlatBank)
    assert isinstance(named, FlatBank)
    assert timed.engine_ms.keys() == {"faiss", "torch"}
    assert timed.engine == next(iter(timed.engine_ms))
    assert (untimed.engine_ms, untimed.engine) == ({}, "faiss")
    assert (named.engine_ms, named.engine) == ({}, "torch")


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="needs a CUDA device")
def test_on_cuda_streams_are_an_engine_too() -> None:
    bank = create_bank(FlatBankConfig(capacity=100_000, k=3), dim=16, device=torch.device("cuda"), batch=8)
    assert isinstance(bank, FlatBank)
    assert bank.engine_ms.keys() == {"faiss", "torch", "streams"}
    assert bank.state_dict()["embeddings"].numel() == 0
