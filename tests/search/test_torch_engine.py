"""The torch engine against a sort in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from msf_faiss.search.canonical import rescore
from msf_faiss.search.exact import search_exactly
from msf_faiss.search.torch_engine import TorchEngine, compare, shortlist

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def unit(rows: int, dim: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((rows, dim)).astype(np.float32)), dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 5, 15, 16, 17, 128, 1000, 4111])
@pytest.mark.parametrize("batch", [1, 7, 250])
def test_best_of_any_number_of_rows(dtype: torch.dtype, device: str, rows: int, batch: int) -> None:
    base = unit(rows, 24).to(device, dtype)
    queries = unit(batch, 24, seed=1).to(device, dtype)
    every = torch.arange(rows, device=device).expand(batch, -1)
    for k in (1, 5, 40):
        k = min(k, rows)
        found = search_exactly(TorchEngine(), queries, base, [(0, rows)], torch.neg, k)
        expected = rescore(queries, base, every, -every, k)
        assert torch.equal(found.slots, expected.slots)
        assert torch.equal(found.similarities, expected.similarities)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_tiles(dtype: torch.dtype) -> None:
    """With 16,384 queries the rows are divided into 47 tiles of 64 rows and two blocks of 2,048, with 20 into one."""
    base, queries = unit(3000, 8).to(dtype), unit(16_384, 8, seed=1).to(dtype)
    many, few = (
        search_exactly(TorchEngine(), some, base, [(0, 3000)], torch.neg, 5) for some in (queries, queries[:20])
    )
    assert torch.equal(many.slots[:20], few.slots)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [40, 2000])
def test_bound_covers_all_other_rows(dtype: torch.dtype, rows: int) -> None:
    base, queries = unit(rows, 512).to(dtype), unit(64, 512, seed=1).to(dtype)
    base[20:40] = base[0]  # ties, also at the end of the list
    engine = TorchEngine()
    for count in (1, 13, 39):
        proposal = engine.propose(queries, base, count)
        assert proposal.slots.shape == (64, count)
        assert all(len(set(row)) == count for row in proposal.slots.tolist())
        every = queries.double() @ base.double().T
        others = every.scatter(1, proposal.slots, -torch.inf).amax(dim=1)
        assert (others <= proposal.bound + engine.error(512)).all()


def test_bound_if_all_rows_are_proposed() -> None:
    proposal = TorchEngine().propose(unit(3, 8), unit(50, 8, seed=1), 50)
    assert proposal.slots.sort(dim=1).values.tolist() == [list(range(50))] * 3
    assert (proposal.bound == -torch.inf).all()


def test_bfloat16_search_is_proven_without_widening() -> None:
    """Although the maxima of the groups are rounded."""
    base = unit(20_000, 64).bfloat16()
    queries = unit(64, 64, seed=1).bfloat16()
    proposal = TorchEngine().propose(queries, base, 13)
    fifth = (queries.double() @ base.double().T).topk(5).values[:, -1]
    assert (fifth > proposal.bound + TorchEngine().error(64)).float().mean() > 0.9


def test_nan_queries_get_valid_rows() -> None:
    proposal = TorchEngine().propose(torch.full((2, 8), torch.nan), unit(500, 8), 13)
    assert ((proposal.slots >= 0) & (proposal.slots < 500)).all()


def test_shortlist_of_integer_products_in_several_ranges() -> None:
    values = torch.randint(-1000, 1000, (400, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32)

    def product(start: int, stop: int, out: Tensor) -> None:
        out.copy_(values[start:stop])

    ranges = [(3, 150), (170, 399)]
    listed = shortlist(product, torch.int32, ranges, 6, torch.empty(3, 1))
    allowed = {slot for start, stop in ranges for slot in range(start, stop)}
    for query, slots in enumerate(listed.rows.tolist()):
        assert len(set(slots)) == len(slots)
        assert set(slots) <= allowed
        best = sorted(allowed, key=lambda slot: -int(values[slot, query]))[:6]
        assert {int(values[slot, query]) for slot in best} <= {int(values[slot, query]) for slot in slots}
        assert max(int(values[slot, query]) for slot in allowed - set(slots)) <= int(listed.bound[query])


@pytest.mark.parametrize("dtype", DTYPES)
def test_compare_uses_own_rows_of_each_query(dtype: torch.dtype) -> None:
    base, queries = unit(300, 20).to(dtype), unit(9, 20, seed=1).to(dtype)
    chosen = torch.randint(300, (9, 31), generator=torch.Generator().manual_seed(0))
    expected = (queries.double() @ base.double().T).gather(1, chosen)
    # Twenty products summed in float32.
    torch.testing.assert_close(compare(queries, base, chosen).double(), expected, rtol=0, atol=1e-6)
