"""The pq scan: its codes follow the ring, and its code books are trained again."""

import numpy as np
import pytest
import torch
from scans import push, push_at_once, unit

from msf_faiss.bank import RingSpec
from msf_faiss.bank.scan.pq import PqScanBank, _pad


def assert_codes_follow_ring(bank: PqScanBank) -> None:
    """Assert that every slot decodes to the encoded row of the ring."""
    assert bank._codes is not None
    assert bank._codes.covered == len(bank)
    for codes in (bank._codes, bank._next_codes):
        if codes is not None:
            index = codes._index
            assert index.ntotal == codes.covered
            expected = index.sa_decode(index.sa_encode(_pad(bank._entries[: codes.covered], index.d)))
            decoded = np.stack([index.reconstruct(slot) for slot in range(codes.covered)])
            assert np.array_equal(decoded, expected)


@pytest.mark.parametrize("capacity", [4096, 4100, 4999])
@pytest.mark.parametrize("dim", [16, 18])
def test_codes_follow_ring_through_rotations(capacity: int, dim: int) -> None:
    bank = PqScanBank(RingSpec(capacity, dim))
    for seed in range(40):
        push_at_once(bank, unit([1, 31, 256, 700, 1024][seed % 5], dim, seed))
    assert bank.pushed > 3 * capacity
    assert_codes_follow_ring(bank)


def test_raise_recall_trains_code_books_after_entries_changed() -> None:
    bank = PqScanBank(RingSpec(5000, 16))
    push(bank, unit(5000, 16))
    push(bank, unit(3000, 16, seed=1))
    books = bank._index_state()["pq.codes.books"]
    assert "trains its code books again" in bank.raise_recall()
    assert torch.equal(books, bank._index_state()["pq.codes.books"])
    push_at_once(bank, unit(700, 16, seed=2))
    assert not torch.equal(books, bank._index_state()["pq.codes.books"])
    assert_codes_follow_ring(bank)
    assert "2 times as many" in bank.raise_recall()


def test_pushes_encode_a_few_entries_with_new_code_books_until_all_are() -> None:
    bank = PqScanBank(RingSpec(5000, 16))
    push(bank, unit(8000, 16))
    bank.raise_recall()
    books = bank._index_state()["pq.codes.books"]
    for seed in range(6):
        push_at_once(bank, unit(100, 16, seed))
        assert bank._index_state()["pq.coming.covered"] == (seed + 1) * 800
        assert_codes_follow_ring(bank)
    again = PqScanBank(RingSpec(5000, 16))
    again.load_state_dict(bank.state_dict())
    for each in (bank, again):
        push_at_once(each, unit(100, 16, 7))
        assert not torch.equal(books, each._index_state()["pq.codes.books"])
        assert_codes_follow_ring(each)
    assert torch.equal(*(each._index_state()["pq.codes.books"] for each in (bank, again)))


def test_error_on_cuda_names_alternatives() -> None:
    with pytest.raises(
        ValueError, match=r"runs on the CPU only; on cuda choose bank\.kind flat, or scan with bf16 or int8"
    ):
        PqScanBank(RingSpec(100, 16, device="cuda"))
