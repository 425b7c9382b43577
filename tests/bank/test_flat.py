"""What only the FAISS bank has to show."""

import numpy as np
import pytest
import torch

from msf_faiss.bank import FlatBank, ReferenceBank
from msf_faiss.search import faiss_engines as engines
from msf_faiss.search.canonical import canonical
from msf_faiss.search.knn import knn


def unit(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((rows, dim)).astype(np.float32)), dim=1)


def test_near_ties_are_found_as_in_float64() -> None:
    """Hundreds of entries closer together than float32 can tell: FAISS's own order of them is wrong."""
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal((3000, 128)).astype(np.float32))
    crowd = torch.nn.functional.normalize(unit(1, 128) + 4e-4 * noise, dim=1)
    exact, fast = ReferenceBank(3000, 128), FlatBank(3000, 128)
    for bank in (exact, fast):
        bank.push(crowd, torch.arange(3000))
    queries = unit(1, 128).expand(2, -1)
    raw = engines.faiss.knn(queries.numpy(), crowd.numpy(), 13, metric=engines.faiss.METRIC_INNER_PRODUCT)[1]
    expected = exact.search(queries, 13)
    assert raw.tolist() != expected.slots.tolist()
    for k in (1, 5, 13):
        assert torch.equal(fast.search(queries, k).slots, expected.slots[:, :k])


def test_16_bit_rings_are_searched_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_TILE", 37)
    exact, fast = ReferenceBank(500, 16, torch.bfloat16), FlatBank(500, 16, torch.bfloat16)
    for bank in (exact, fast):
        bank.push(unit(450, 16), torch.arange(450))
    for k in (1, 5, 60):
        for found, expected in zip(fast.search(unit(9, 16, 1), k), exact.search(unit(9, 16, 1), k), strict=True):
            assert torch.equal(found, expected)


def test_the_ring_is_searched_in_place() -> None:
    """FAISS gets the ring's own memory: what changes there changes the answer, with nothing told to the bank."""
    bank = FlatBank(100, 16)
    bank.push(unit(100, 16), torch.arange(100))
    seen = []
    search = engines.faiss.knn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engines.faiss, "knn", lambda q, rows, *a, **b: seen.append(rows.ctypes.data) or search(q, rows, *a, **b)
        )
        bank.search(unit(4, 16, 1), 5)
    assert seen == [bank.state_dict()["embeddings"].data_ptr()]


def test_a_float64_ring_is_refused() -> None:
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        FlatBank(8, 4, torch.float64)


@pytest.mark.parametrize("k", [1, 20, 200, 5000])
def test_knn_agrees_with_a_full_sort(k: int) -> None:
    base, queries = unit(700, 24), unit(33, 24, 1)
    base[13] = base[600]  # a tie: the lowest row comes first
    found = knn(torch.cat([queries, base[600:601]]), base, k)
    every = (torch.cat([queries, base[600:601]]).double().unsqueeze(1) * base.double()).sum(2).float()
    similarities, rows = every.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.slots, rows[:, :k])
    assert torch.equal(found.similarities, similarities[:, :k])


def test_knn_names_mistakes() -> None:
    with pytest.raises(ValueError, match="must be"):
        knn(unit(2, 8), unit(5, 7), 1)
    with pytest.raises(ValueError, match="float32"):
        knn(unit(2, 8).double(), unit(5, 8).double(), 1)
    with pytest.raises(ValueError, match="at least 1"):
        knn(unit(2, 8), unit(5, 8), 0)
    assert knn(unit(2, 8), torch.empty(0, 8), 3).slots.shape == (2, 0)


def test_canonical_bits_do_not_depend_on_the_batch() -> None:
    base, queries = unit(300, 512), unit(64, 512, 1)
    every = torch.arange(300).expand(64, -1)
    whole = canonical(queries, base, every, every, 10)
    for row in (0, 31, 63):
        alone = canonical(queries[row : row + 1], base, every[:1], every[:1], 10)
        assert torch.equal(alone.similarities[0], whole.similarities[row])
        few = canonical(
            queries[row : row + 1], base, whole.slots[row : row + 1].flip(1), whole.slots[row : row + 1].flip(1), 10
        )
        assert torch.equal(few.slots[0], whole.slots[row])
        assert torch.equal(few.similarities[0], whole.similarities[row])
