"""The exact bank: ties, tiles, the choice of the engine, and searches in place."""

import numpy as np
import pytest
import torch
from torch import Tensor

from msf_faiss.bank import FlatBank, ReferenceBank, RingSpec
from msf_faiss.search.faiss_engines import FaissCpu
from msf_faiss.search.faiss_setup import faiss
from msf_faiss.search.torch_engine import TorchEngine


def unit(rows: int, dim: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((rows, dim)).astype(np.float32)), dim=1)


def assert_same_neighbors(bank: FlatBank, reference: ReferenceBank, queries: Tensor, k: int) -> None:
    for found, expected in zip(bank.search(queries, k), reference.search(queries, k), strict=True):
        assert torch.equal(found, expected)


def test_near_ties_match_float64() -> None:
    """Hundreds of entries closer together than float32 can distinguish, which FAISS alone orders wrongly."""
    reference, bank = ReferenceBank(RingSpec(3000, 128)), FlatBank(RingSpec(3000, 128))
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((3000, 128)).astype(np.float32))
    crowd = torch.nn.functional.normalize(unit(1, 128) + 4e-4 * noise, dim=1)
    for each in (reference, bank):
        each.push(crowd, torch.arange(3000))
    queries = unit(1, 128).expand(2, -1)
    raw = faiss.knn(queries.numpy(), crowd.numpy(), 13, metric=faiss.METRIC_INNER_PRODUCT)[1]
    assert raw.tolist() != reference.search(queries, 13).slots.tolist()
    for k in (1, 5, 13):
        assert_same_neighbors(bank, reference, queries, k)


def test_16_bit_ring_is_searched_in_tiles() -> None:
    spec = RingSpec(500, 16, torch.bfloat16)
    reference, bank = ReferenceBank(spec), FlatBank(spec, engine=FaissCpu(tile=37))
    for each in (reference, bank):
        each.push(unit(450, 16), torch.arange(450))
    for k in (1, 5, 60):
        assert_same_neighbors(bank, reference, unit(9, 16, 1), k)


@pytest.mark.parametrize("engine", [FaissCpu(), TorchEngine()], ids=["faiss", "torch"])
def test_max_age_across_the_end_of_the_ring(engine: FaissCpu | TorchEngine) -> None:
    """The live slots are two ranges, 0 to 249 and 650 to 999, neither of which may hide entries of the other."""
    spec = RingSpec(1000, 32, max_age=599)
    reference, bank = ReferenceBank(spec), FlatBank(spec, engine=engine)
    for each in (reference, bank):
        each.push(unit(1250, 32, 7), torch.arange(1250))
    queries = unit(300, 32, 8)
    for k in (1, 5, 300, 600):
        assert_same_neighbors(bank, reference, queries, k)
    slots = bank.search(queries, 5).slots
    assert (slots < 250).any()
    assert (slots >= 650).any()
    assert not ((slots >= 250) & (slots < 650)).any()


def test_ring_is_searched_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = FlatBank(RingSpec(100, 16))
    bank.push(unit(100, 16), torch.arange(100))
    pointers, knn = [], faiss.knn
    monkeypatch.setattr(
        faiss, "knn", lambda q, rows, *a, **b: pointers.append(rows.ctypes.data) or knn(q, rows, *a, **b)
    )
    bank.search(unit(4, 16, 1), 5)
    assert pointers == [bank.state_dict()["embeddings"].data_ptr()]


def test_use_fastest_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msf_faiss.bank.flat.time_engines", lambda entries, batch, k: {"torch": 1.0, "faiss": 2.0})
    bank = FlatBank(RingSpec(50, 16))
    assert (bank.engine, bank.engine_ms) == ("faiss", {})
    bank.use_fastest_engine(batch=8, k=3)
    assert (bank.engine, bank.engine_ms) == ("torch", {"torch": 1.0, "faiss": 2.0})
    assert "engine torch" in repr(bank)
    bank.push(unit(3, 16), torch.arange(3))
    with pytest.raises(AssertionError, match="timing overwrites the ring"):
        bank.use_fastest_engine(batch=8, k=3)


def test_float64_raises() -> None:
    with pytest.raises(ValueError, match=r"FlatBank stores float32, float16, bfloat16, not torch\.float64"):
        FlatBank(RingSpec(8, 4, torch.float64))
