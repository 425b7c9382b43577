"""The proposals of FAISS's engines, for all dtypes and numbers of rows."""

import numpy as np
import pytest
import torch
from torch import Tensor

from msf_faiss.search.faiss_engines import FaissCpu, FaissCuda, default_engine
from msf_faiss.search.faiss_setup import faiss, has_gpu
from msf_faiss.search.torch_engine import TorchEngine

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def unit(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = np.random.default_rng(seed)
    vectors = torch.from_numpy(rng.standard_normal((rows, 24)).astype(np.float32))
    return torch.nn.functional.normalize(vectors, dim=1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 36, 37, 38, 74, 300])
@pytest.mark.parametrize("count", [1, 5, 37, 40, 300])
def test_best_rows_are_proposed_across_tiles(dtype: torch.dtype, rows: int, count: int) -> None:
    """A tile smaller than the count and of its size, several tiles, and a last one of a single row."""
    engine, count = FaissCpu(tile=37), min(count, rows)
    queries, base = unit(9, 1, dtype), unit(rows, 0, dtype)
    exact = queries.double() @ base.double().T
    proposal = engine.propose(queries, base, count)
    assert proposal.slots.shape == (9, count)
    assert proposal.slots.dtype == torch.int64
    assert torch.equal(proposal.slots.sort(dim=1).values, exact.topk(count, dim=1).indices.sort(dim=1).values)
    kth = torch.full((9,), -torch.inf) if count == rows else exact.topk(count).values[:, -1].float()
    assert proposal.bound.dtype == torch.float32
    torch.testing.assert_close(proposal.bound, kth, rtol=0, atol=FaissCpu().error(24))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_queries_get_valid_rows(dtype: torch.dtype) -> None:
    queries = torch.full((2, 24), torch.nan, dtype=dtype)
    proposal = FaissCpu().propose(queries, unit(50, 0, dtype), 5)
    assert ((proposal.slots >= 0) & (proposal.slots < 50)).all()


def test_range_of_a_ring_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    ring, pointers, knn = unit(100, 0), [], faiss.knn
    monkeypatch.setattr(
        faiss, "knn", lambda q, rows, *a, **b: pointers.append(rows.ctypes.data) or knn(q, rows, *a, **b)
    )
    proposal = FaissCpu().propose(unit(3, 1), ring[40:90], 5)
    assert pointers == [ring[40:].data_ptr()]
    assert (proposal.slots < 50).all()


def test_default_engine_works_here() -> None:
    assert isinstance(default_engine(torch.device("cpu")), FaissCpu)
    # Without a GPU FAISS would abort the process; torch raises an error.
    assert isinstance(default_engine(torch.device("cuda")), FaissCuda if has_gpu() else TorchEngine)


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("count", [1, 13, 3000])
def test_cuda_proposes_best_rows(dtype: torch.dtype, streams: int, count: int) -> None:
    queries, base = unit(300, 1, dtype).cuda(), unit(140_000, 0, dtype).cuda()
    exact = queries.double() @ base.double().T
    proposal = FaissCuda(streams).propose(queries, base, count)
    others = exact.scatter(1, proposal.slots, -torch.inf).amax(dim=1)
    assert (others <= proposal.bound.double() + FaissCuda().error(24)).all()
    assert (proposal.slots.sort(dim=1).values.diff(dim=1) > 0).all()
