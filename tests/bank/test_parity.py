"""The neighbours do not depend on what proposes the candidates: FAISS's flat index and the approximate banks, asked for
all entries, agree bit for bit with a sort in float64."""

import numpy as np
import pytest
import torch
from banks import SMALL, BankKind, count_indexed_queries
from oracle import DIM, Oracle, assert_agree, unit
from torch import Tensor

from msf_faiss.bank import IvfBank, ReferenceBank, RingSpec
from msf_faiss.bank.scan import SCAN_BANKS, ScanLimits
from msf_faiss.search.canonical import rescore
from msf_faiss.search.faiss_setup import faiss

CAPACITY, BATCH, K = 400, 50, 8

# Every shortlist has all entries.
LIMITS = ScanLimits(newest=8, margin=CAPACITY, group=2, first_groups=CAPACITY, training=SMALL.training)
COMPLETE = [
    BankKind("ivf", lambda spec: IvfBank(spec, lists=8, probes=8, exact_below=16, margin=CAPACITY)),
    BankKind(
        "ivf-segments", lambda spec: IvfBank(spec, lists=4, probes=4, segments=4, exact_below=16, margin=CAPACITY)
    ),
    BankKind("scan-int8", lambda spec: SCAN_BANKS["int8"](spec, limits=LIMITS)),
    BankKind("scan-pq", lambda spec: SCAN_BANKS["pq"](spec, limits=LIMITS)),
]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def pushes_and_queries() -> tuple[list[Tensor], Tensor]:
    """More than a rotation of pushes, in which four vectors recur, and queries that start with those four."""
    rng = np.random.default_rng(0)
    twins = unit(rng, 4)
    pushes = [torch.cat([unit(rng, 30), twins[torch.from_numpy(rng.integers(0, 4, 20))]]) for _ in range(13)]
    return pushes, torch.cat([twins, pushes[-1][:10], unit(rng, 10)])


def test_rescored_faiss_index_agrees_with_float64(dtype: torch.dtype) -> None:
    bank, oracle = ReferenceBank(RingSpec(CAPACITY, DIM, dtype)), Oracle(CAPACITY, dtype)
    pushes, queries = pushes_and_queries()
    for vectors in pushes:
        for each in (bank, oracle):
            each.push(vectors, torch.arange(BATCH))
    index = faiss.IndexFlatIP(DIM)
    entries = bank.state_dict()["embeddings"]
    index.add(entries.float().numpy())
    queries = queries.to(dtype)
    # More than there are copies of any vector.
    slots = torch.from_numpy(index.search(queries.float().numpy(), 200)[1])
    found = rescore(queries, entries, slots, bank.age(slots), K)
    for row, query in enumerate(queries):
        expected = oracle.search(query, K)
        assert found.slots[row].tolist() == [slot for _, slot, _, _ in expected]
        assert found.similarities[row].tolist() == [similarity for similarity, _, _, _ in expected]
    assert (found.similarities[:4, 0] == found.similarities[:4, -1]).all()  # all copies


@pytest.mark.parametrize("kind", COMPLETE, ids=str)
def test_approximate_bank_that_compares_all_entries_agrees_with_float64(kind: BankKind, dtype: torch.dtype) -> None:
    bank, oracle = kind(CAPACITY, DIM, dtype), Oracle(CAPACITY, dtype)
    pushes, queries = pushes_and_queries()
    for vectors in pushes:
        for each in (bank, oracle):
            each.push(vectors, torch.arange(BATCH))
    with count_indexed_queries() as counts:
        assert_agree(bank, oracle, queries, K)
    assert counts == [len(queries)]
