"""Whoever proposes the candidates, the neighbours are the same bit for bit: a sort in float64, FAISS's index that holds
everything, and the approximate banks where they are asked for everything."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from banks import BankKind, small_indexes
from oracle import DIM, Oracle, assert_agree, unit
from torch import Tensor

from msf_faiss.bank import IvfBank, ReferenceBank
from msf_faiss.bank.ivf import bank as ivf
from msf_faiss.bank.scan import base as scan
from msf_faiss.bank.scan.int8 import Int8ScanBank
from msf_faiss.bank.scan.pq import PqScanBank
from msf_faiss.search.canonical import canonical
from msf_faiss.search.faiss_setup import faiss

CAPACITY, BATCH, K = 400, 50, 8

COMPLETE = [
    BankKind("ivf", lambda *a: IvfBank(*a, lists=8, probes=8)),
    BankKind("ivf-segments", lambda *a: IvfBank(*a, lists=4, probes=4, segments=4)),
    BankKind("scan-int8", Int8ScanBank),
    BankKind("scan-pq", PqScanBank),
]


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Shortlists are as long as the bank."""
    with small_indexes() as answered:
        for module in (scan, ivf):
            monkeypatch.setattr(module, "MARGIN", CAPACITY)
        monkeypatch.setattr(scan, "_FEWEST", CAPACITY)
        yield answered


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def life() -> tuple[list[Tensor], Tensor]:
    """Pushes of more than a rotation, in which four vectors come again and again, and queries with those four first."""
    rng = np.random.default_rng(0)
    twins = unit(rng, 4)
    pushes = [torch.cat([unit(rng, 30), twins[torch.from_numpy(rng.integers(0, 4, 20))]]) for _ in range(13)]
    return pushes, torch.cat([twins, pushes[-1][:10], unit(rng, 10)])


def test_an_index_of_faiss_that_holds_everything_agrees_with_float64(dtype: torch.dtype) -> None:
    bank, oracle = ReferenceBank(CAPACITY, DIM, dtype), Oracle(CAPACITY, dtype)
    pushes, queries = life()
    for vectors in pushes:
        for each in (bank, oracle):
            each.push(vectors, torch.arange(BATCH))
    index = faiss.IndexFlatIP(DIM)
    entries = bank.state_dict()["embeddings"]
    index.add(entries.float().numpy())
    queries = queries.to(dtype)
    # More than there are copies of any vector.
    slots = torch.from_numpy(index.search(queries.float().numpy(), 200)[1])
    found = canonical(queries, entries, slots, bank.age(slots), K)
    for row, query in enumerate(queries):
        expected = oracle.search(query, K)
        assert found.slots[row].tolist() == [slot for _, slot, _, _ in expected]
        assert found.similarities[row].tolist() == [similarity for similarity, _, _, _ in expected]
    assert (found.similarities[:4, 0] == found.similarities[:4, -1]).all()  # nothing but copies


@pytest.mark.parametrize("kind", COMPLETE, ids=str)
def test_a_bank_that_compares_everything_agrees_with_float64(
    kind: BankKind, dtype: torch.dtype, answered: list[int]
) -> None:
    bank, oracle = kind(CAPACITY, DIM, dtype), Oracle(CAPACITY, dtype)
    pushes, queries = life()
    for vectors in pushes:
        for each in (bank, oracle):
            each.push(vectors, torch.arange(BATCH))
    assert_agree(bank, oracle, queries, K)
    assert answered == [len(queries)]
