"""The int8 scan: its rotation, and vectors that are hard for it."""

import pytest
import torch
from scans import create, crowded, push, recall, unit

from msf_faiss.bank import RingSpec
from msf_faiss.bank.scan import ScanLimits
from msf_faiss.bank.scan.int8 import Int8ScanBank, _mix, _signs


def test_vectors_with_one_large_component() -> None:
    vectors = unit(8000, 48)
    vectors[:, 3] += 3
    bank = create("int8", 8000, 48)
    push(bank, torch.nn.functional.normalize(vectors, dim=1))
    assert recall(bank, bank.reconstruct(torch.arange(100)), 5) > 0.999


@pytest.mark.parametrize("dim", [1, 2, 7, 16, 50, 512])
def test_mix_keeps_products(dim: int) -> None:
    vectors = unit(40, dim)
    mixed = _mix(vectors, _signs(dim))
    # Sums of 512 numbers in float32, twice.
    torch.testing.assert_close(mixed @ mixed.T, vectors @ vectors.T, rtol=0, atol=1e-5)
    assert torch.equal(_mix(vectors[7:9], _signs(dim)), mixed[7:9])


def test_raise_recall_compares_more_candidates() -> None:
    """All entries are closer together than 8 bits can distinguish, so only comparing more of them helps."""
    bank = Int8ScanBank(RingSpec(6000, 64), limits=ScanLimits(most_groups=16))
    push(bank, crowded(6000, 64, spread=0.02))
    queries = crowded(100, 64, spread=0.02, seed=1)
    before = recall(bank, queries, 5)
    bank.raise_recall()
    bank.raise_recall()
    assert before < recall(bank, queries, 5)
