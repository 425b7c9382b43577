"""The bf16 scan against the reference, bit for bit, and its proofs."""

import pytest
import torch
from scans import (
    DEVICES,
    assert_same_neighbors,
    cloned_state,
    clustered,
    create,
    crowded,
    push,
    push_at_once,
    unit,
)

from msf_faiss.bank import ReferenceBank, RingSpec
from msf_faiss.bank.scan import ScanLimits
from msf_faiss.bank.scan.bf16 import Bf16ScanBank


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("capacity", "max_age", "dtype"),
    [
        (5, None, torch.float16),
        (16, 30, torch.bfloat16),
        (1000, None, torch.bfloat16),
        (1000, 30, torch.float32),
        (1000, 700, torch.float16),
        (1601, None, torch.float32),
        (1601, 30, torch.float16),
        (1601, 700, torch.bfloat16),
    ],
    ids=str,
)
def test_matches_reference_through_rotations(
    dtype: torch.dtype, device: str, capacity: int, max_age: int | None
) -> None:
    spec = RingSpec(capacity, 24, dtype, device, max_age)
    bank, reference = Bf16ScanBank(spec), ReferenceBank(spec)
    for seed, size in enumerate([3, 250, 900, 256, 64, 1, 600]):
        vectors = unit(size, 24, seed)
        for each in (bank, reference):
            push_at_once(each, vectors)
        for k in (1, 5, 40):
            assert_same_neighbors(bank, reference, torch.cat([vectors[-20:], unit(5, 24, seed + 50)]), k)


@pytest.mark.parametrize("batch", [1, 64, 249, 250, 256])
def test_matches_reference_for_any_batch_size(batch: int) -> None:
    bank, reference = create("bf16", 3000, 64), ReferenceBank(RingSpec(3000, 64))
    for each in (bank, reference):
        push(each, unit(3100, 64))
    assert_same_neighbors(bank, reference, unit(256, 64, seed=1)[:batch], 5)


def test_unproven_queries_are_searched_exactly() -> None:
    """With more entries closer together than bfloat16 can distinguish than are compared."""
    bank, reference = create("bf16", 6000, 128), ReferenceBank(RingSpec(6000, 128))
    apart = unit(2000, 128, seed=6)
    for each in (bank, reference):
        push(each, torch.cat([crowded(4000, 128, spread=0.02), apart]))
    assert_same_neighbors(bank, reference, torch.cat([crowded(3, 128, spread=0.02, seed=8), apart[:7]]), 5)
    assert bank.metrics()["proved_ratio"] == 0.7
    assert bank.metrics() == {}


def test_searches_skip_scans_that_prove_nothing_also_after_resume() -> None:
    limits = ScanLimits(first_groups=128)
    bank, again = (Bf16ScanBank(RingSpec(4000, 128), limits=limits) for _ in range(2))
    reference = ReferenceBank(RingSpec(4000, 128))
    crowd = crowded(4000, 128, spread=0.02)
    for each in (bank, reference):
        push(each, crowd)
    scans, resumed = [], []
    for search in range(20):
        scans.append(bank._unscanned == 0)
        assert_same_neighbors(bank, reference, crowd[search : search + 3], 5)
        if search == 10:
            again.load_state_dict(cloned_state(bank))
        if search > 10:
            resumed.append(again._unscanned == 0)
            again.search(crowd[search : search + 3], 5)
    assert [number for number, scanned in enumerate(scans) if scanned] == [0, 16]
    assert resumed == scans[11:]


def test_most_queries_are_proven() -> None:
    bank = create("bf16", 20_000, 64)
    push(bank, clustered(20_000, 64))
    bank.search(clustered(256, 64, seed=5), 5)
    assert bank.metrics()["proved_ratio"] > 0.95


def test_metrics_are_saved() -> None:
    bank, again = create("bf16", 3000, 32), create("bf16", 3000, 32)
    push(bank, unit(3000, 32))
    bank.search(unit(9, 32, seed=1), 5)
    again.load_state_dict(cloned_state(bank))
    assert again.metrics() == bank.metrics()


def test_bfloat16_ring_is_not_copied() -> None:
    assert Bf16ScanBank.extra_bytes(512, torch.bfloat16) == 0
    bank = create("bf16", 100, 16, torch.bfloat16)
    assert bank._copy is bank._entries  # type: ignore[attr-defined]
