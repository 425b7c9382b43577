"""The exact bank on CUDA against FAISS's own index: streams, devices, batches, and FAISS's memory."""

import ctypes

import pytest
import torch
from torch import Tensor

from msf_faiss.bank import FlatBank, RingSpec
from msf_faiss.bank.scan import SCAN_BANKS
from msf_faiss.search import faiss_setup
from msf_faiss.search.autotune import engines
from msf_faiss.search.canonical import rescore
from msf_faiss.search.faiss_setup import faiss, gpu_resources, has_gpu
from msf_faiss.search.neighbors import Neighbors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs a CUDA device")]

CAPACITY, DIM, K = 150_000, 64, 5  # enough entries for several streams


@pytest.fixture(params=["faiss", "streams", "torch"])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[256, 512, 4096])
def batch(request: pytest.FixtureRequest) -> int:
    return request.param


def unit(rows: int, seed: int) -> Tensor:
    vectors = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def filled(engine: str, dtype: torch.dtype = torch.float32, device: str = "cuda") -> FlatBank:
    bank = FlatBank(RingSpec(CAPACITY, DIM, dtype, device), engine=engines(torch.device(device))[engine])
    push(bank, unit(CAPACITY, 0))
    push(bank, unit(1000, 1))
    return bank


def push(bank: FlatBank, vectors: Tensor) -> None:
    bank.push(vectors.to(bank.device), torch.arange(len(vectors), device=bank.device))


def search_with_faiss_index(bank: FlatBank, queries: Tensor) -> Neighbors:
    """Return the neighbours that FAISS's index on the same device proposes, rescored."""
    entries, queries = bank.state_dict()["embeddings"], queries.to(bank.dtype)
    index = faiss.GpuIndexFlatIP(gpu_resources(bank.device), DIM)
    index.add(entries.float())
    slots = index.search(queries.float(), K + 8)[1]
    return rescore(queries, entries, slots, bank.age(slots), K)


def test_neighbors_match_faiss_index(engine: str, dtype: torch.dtype, batch: int) -> None:
    bank, queries = filled(engine, dtype), unit(batch, 2).cuda()
    for found, expected in zip(bank.search(queries, K), search_with_faiss_index(bank, queries), strict=True):
        assert torch.equal(found, expected)


def test_search_waits_for_push_on_any_stream(engine: str, dtype: torch.dtype) -> None:
    bank, vectors, ids = filled(engine, dtype), unit(256, 2).cuda(), torch.arange(256, device="cuda")
    bank.search(vectors, 1)  # the first search synchronizes
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, .1 s: enough for a search on another stream to finish too early
        bank.push(vectors, ids)
        found = bank.search(vectors, 1)
        ages = bank.age(found.slots)
    stream.synchronize()
    assert ages[:, 0].tolist() == list(range(255, -1, -1))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_bank_on_second_device(engine: str, dtype: torch.dtype) -> None:
    with torch.cuda.device(0):
        first, second = filled(engine, dtype, "cuda:0"), filled(engine, dtype, "cuda:1")
        queries = unit(256, 2)
        expected, found = (bank.search(queries.to(bank.device), K) for bank in (first, second))
    assert found.slots.device == torch.device("cuda:1")
    assert torch.equal(found.slots.cpu(), expected.slots.cpu())
    # A float64 sum whose order may depend on the device, rounded to float32.
    torch.testing.assert_close(found.similarities.cpu(), expected.similarities.cpu(), rtol=0, atol=2.0**-23)


@pytest.mark.parametrize("engine", ["faiss", "streams"])
def test_only_the_first_search_allocates(
    engine: str, dtype: torch.dtype, batch: int, capfd: pytest.CaptureFixture[str]
) -> None:
    faiss_setup.drop_gpu_resources()
    bank, queries = filled(engine, dtype), unit(batch, 2).cuda()
    bank.search(queries, K)
    torch.cuda.synchronize()
    resources = list(faiss_setup._per_thread.resources.values())
    assert len(resources) == {"faiss": 1, "streams": 4}[engine]

    def in_use() -> tuple[object, ...]:
        return *(each.getMemoryInfo() for each in resources), torch.cuda.memory_allocated()

    before = in_use()
    # Only FAISS's log shows memory that is freed within a search.
    for each in resources:
        each.setLogMemoryAllocations(True)
    for _ in range(3):
        bank.search(queries, K)
    torch.cuda.synchronize()
    for each in resources:
        each.setLogMemoryAllocations(False)
    ctypes.CDLL(None).fflush(None)
    log = capfd.readouterr().out
    assert "space Temporary" in log
    assert "Device" not in log
    assert in_use() == before


@pytest.mark.parametrize("scan", ["bf16", "int8"])
def test_rows_are_masked_without_waiting(scan: str) -> None:
    rows = unit(400, 3).cuda()
    rows[3, 2], rows[7] = torch.nan, 2 * rows[7]
    for bank in (FlatBank(RingSpec(500, DIM, device="cuda")), SCAN_BANKS[scan](RingSpec(500, DIM, device="cuda"))):
        torch.cuda.set_sync_debug_mode("error")
        try:
            bank.push(rows, torch.arange(400, device="cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = bank.search(rows, 2)
        assert found.similarities.isnan().any(dim=1).nonzero().flatten().tolist() == [3, 7]
        assert bank.metrics()["masked_rows"] == 2
