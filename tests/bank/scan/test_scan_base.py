"""What the scanning banks have in common, at their default limits; test_contract.py has small banks."""

import pytest
import torch
from scans import (
    DTYPES,
    assert_same_neighbors,
    cloned_state,
    clustered,
    create,
    crowded,
    push,
    push_at_once,
    recall,
    unit,
)

from msf_faiss.bank import ReferenceBank, RingSpec
from msf_faiss.bank.scan import SCAN_BANKS


@pytest.mark.parametrize("scan", SCAN_BANKS)
@pytest.mark.parametrize("copies", [2, 30, 300])
def test_youngest_of_many_copies_come_first(scan: str, copies: int) -> None:
    bank, reference = create(scan, 5000, 32), ReferenceBank(RingSpec(5000, 32))
    twin = unit(1, 32, seed=7)
    for each in (bank, reference):
        for vectors in (unit(4800, 32), twin.expand(copies, -1), unit(50, 32, seed=1)):
            push(each, vectors)
    for k in (5, 12):  # beyond the copies, an approximate bank may miss some
        assert_same_neighbors(bank, reference, twin, min(k, copies))


@pytest.mark.parametrize("scan", SCAN_BANKS)
def test_identical_entries_come_youngest_first(scan: str) -> None:
    bank, reference = create(scan, 5000, 32), ReferenceBank(RingSpec(5000, 32))
    for each in (bank, reference):
        push(each, unit(1, 32).expand(6000, -1))
    assert_same_neighbors(bank, reference, unit(1, 32).expand(3, -1), 10)


@pytest.mark.parametrize("scan", ["bf16", "int8"])
def test_number_of_groups_grows_with_need_and_is_saved(scan: str) -> None:
    bank, again = (create(scan, 20_000, 64) for _ in range(2))
    push(bank, unit(20_000, 64))
    bank.search(unit(64, 64, seed=1), 5)
    assert bank._groups == 16
    push(bank, crowded(20_000, 64, spread=0.1))
    groups = []
    for seed in range(6):
        crowd = crowded(64, 64, spread=0.1, seed=seed)
        found, repeated = bank.search(crowd, 5), bank.search(crowd, 5)
        assert torch.equal(found.slots, repeated.slots)
        again.load_state_dict(cloned_state(bank))
        for each in (bank, again):
            push_at_once(each, crowd)
        assert again._groups == bank._groups
        groups.append(bank._groups)
    assert groups[0] == 32
    assert 32 < groups[-1] <= 128


@pytest.mark.parametrize("scan", SCAN_BANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resumed_bank_continues_bit_for_bit(scan: str, dtype: torch.dtype) -> None:
    bank, again = (create(scan, 5003, 20, dtype) for _ in range(2))
    for seed in range(7):
        push(bank, clustered(1000, 20, seed))
    push(again, unit(5003, 20, seed=30))  # must be overwritten
    again.load_state_dict(cloned_state(bank))
    for seed in range(3):
        more = clustered(256, 20, seed=20 + seed)
        for each in (bank, again):
            push(each, more)
        assert_same_neighbors(again, bank, more, 5)


@pytest.mark.parametrize("scan", SCAN_BANKS)
@pytest.mark.parametrize("capacity", [100, 4500, 9000])
def test_load_state_of_other_kind_and_capacity(scan: str, capacity: int) -> None:
    saved = create("int8" if scan == "pq" else "pq", 6000, 20)
    bank, reference = create(scan, capacity, 20), ReferenceBank(RingSpec(capacity, 20))
    push(saved, clustered(7000, 20))
    for each in (bank, reference):
        each.load_state_dict(saved.state_dict())
        push(each, clustered(300, 20, seed=1))
    queries = clustered(50, 20, seed=2)
    found, expected = bank.search(queries, 5), reference.search(queries, 5)
    assert (found.slots == expected.slots).double().mean() > 0.98
    assert (bank.age(found.slots) < len(bank)).all()


@pytest.mark.parametrize("scan", ["int8", "pq"])
@pytest.mark.parametrize("dim", [32, 50, 64])
def test_recall(scan: str, dim: int) -> None:
    bank = create(scan, 20_000, dim)
    for seed in range(6):
        push(bank, clustered(4000, dim, seed))
    assert recall(bank, clustered(256, dim, seed=9), 5) >= {"int8": 0.9999, "pq": 0.97}[scan]


@pytest.mark.parametrize("scan", ["int8", "pq"])
def test_raise_recall_ends_in_exact_search_and_is_saved(scan: str) -> None:
    bank, reference = create(scan, 6000, 64), ReferenceBank(RingSpec(6000, 64))
    for each in (bank, reference):
        push(each, unit(6000, 64))
    changes = [bank.raise_recall() for _ in range(4)]
    assert "2 times as many" in changes[0]
    assert "searches exactly" in changes[-1]
    again = create(scan, 6000, 64)
    again.load_state_dict(bank.state_dict())
    for each in (bank, again):
        assert_same_neighbors(each, reference, unit(64, 64, seed=1), 5)
    assert "searches exactly" in again.raise_recall()
