"""The scanning banks: bf16 against the reference bit by bit, int8 and pq by their recall, and what each must follow."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from msf_faiss.bank import ApproximateBank, Bank, ReferenceBank
from msf_faiss.bank.scan import base as scan
from msf_faiss.bank.scan.bf16 import Bf16ScanBank
from msf_faiss.bank.scan.create import create_scan_bank, extra_bytes
from msf_faiss.bank.scan.int8 import Int8ScanBank
from msf_faiss.bank.scan.pq import PqScanBank

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
KINDS = ["bf16", "int8", "pq"]


def unit(rows: int, dim: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((rows, dim)).astype(np.float32)), dim=1)


def clustered(rows: int, dim: int, seed: int = 0) -> Tensor:
    """200 clusters, whose centres do not depend on the seed."""
    rng = np.random.default_rng(seed)
    centres = unit(200, dim, seed=99)[torch.from_numpy(rng.integers(0, 200, rows))]
    return torch.nn.functional.normalize(centres + 0.7 * unit(rows, dim, seed=seed + 1), dim=1)


def push(bank: Bank, vectors: Tensor) -> None:
    """In small parts, since the last part is searched exactly."""
    for part in vectors.split(250):
        push_at_once(bank, part)


def push_at_once(bank: Bank, vectors: Tensor) -> None:
    bank.push(vectors.to(bank.device), torch.arange(bank.pushed, bank.pushed + len(vectors), device=bank.device))


def assert_same_answers(bank: Bank, reference: Bank, queries: Tensor, k: int) -> None:
    found, expected = bank.search(queries.to(bank.device), k), reference.search(queries.to(reference.device), k)
    assert torch.equal(found.slots.cpu(), expected.slots.cpu())
    assert torch.equal(found.similarities.cpu(), expected.similarities.cpu())


def recall(bank: ApproximateBank, queries: Tensor, k: int) -> float:
    found, exact = bank.search(queries, k).slots, bank.search_exactly(queries, k).slots
    return float((found.unsqueeze(2) == exact.unsqueeze(1)).any(dim=2).double().mean())


# bf16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity", [5, 16, 1000, 1601])
@pytest.mark.parametrize("max_age", [None, 30, 700])
def test_bf16_answers_as_the_reference_through_rotations(
    dtype: torch.dtype, device: str, capacity: int, max_age: int | None
) -> None:
    bank = create_scan_bank("bf16", capacity, 24, dtype, device, max_age=max_age)
    reference = ReferenceBank(capacity, 24, dtype, device, max_age=max_age)
    for seed, size in enumerate([3, 250, 900, 256, 64, 1, 600]):
        vectors = unit(size, 24, seed)
        for each in (bank, reference):
            push_at_once(each, vectors)
        for k in (1, 5, 40):
            assert_same_answers(bank, reference, torch.cat([vectors[-20:], unit(5, 24, seed + 50)]), k)


@pytest.mark.parametrize("batch", [1, 64, 249, 250, 256])
def test_bf16_answers_batches_of_any_size_alike(batch: int) -> None:
    bank, reference = Bf16ScanBank(3000, 64), ReferenceBank(3000, 64)
    for each in (bank, reference):
        push(each, unit(3100, 64))
    assert_same_answers(bank, reference, unit(256, 64, seed=1)[:batch], 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copies", [2, 30, 300])
def test_of_many_copies_the_youngest_are_found(kind: str, copies: int) -> None:
    bank, reference = create_scan_bank(kind, 5000, 32, torch.float32, "cpu"), ReferenceBank(5000, 32)
    twin = unit(1, 32, seed=7)
    for each in (bank, reference):
        for vectors in (unit(4800, 32), twin.expand(copies, -1), unit(50, 32, seed=1)):
            push(each, vectors)
    for k in (5, 12):  # beyond the copies an approximate bank may miss some
        assert_same_answers(bank, reference, twin, min(k, copies))


@pytest.mark.parametrize("kind", KINDS)
def test_a_collapsed_encoder_is_searched_in_order(kind: str) -> None:
    bank, reference = create_scan_bank(kind, 5000, 32, torch.float32, "cpu"), ReferenceBank(5000, 32)
    for each in (bank, reference):
        push(each, unit(1, 32).expand(6000, -1))
    assert_same_answers(bank, reference, unit(1, 32).expand(3, -1), 10)


def test_an_answer_that_cannot_be_proved_is_searched_exactly() -> None:
    """Entries closer together than bfloat16 can tell, more of them than are compared."""
    bank, reference = Bf16ScanBank(6000, 128), ReferenceBank(6000, 128)
    centre = unit(1, 128, seed=5)
    crowd = torch.nn.functional.normalize(centre + 0.02 * unit(4000, 128), dim=1)
    among = torch.nn.functional.normalize(centre + 0.02 * unit(3, 128, seed=8), dim=1)
    for each in (bank, reference):
        push(each, torch.cat([crowd, unit(2000, 128, seed=6)]))
    apart = unit(2000, 128, seed=6)[:7]
    assert_same_answers(bank, reference, torch.cat([among, apart]), 5)
    assert bank.metrics()["proved_ratio"] == 0.7
    assert bank.metrics() == {}


def test_where_the_scan_proves_nothing_it_is_left_out_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_FEWEST", scan._GROUPS)
    bank, again, reference = Bf16ScanBank(4000, 128), Bf16ScanBank(4000, 128), ReferenceBank(4000, 128)
    crowd = torch.nn.functional.normalize(unit(1, 128, seed=5) + 0.02 * unit(4000, 128), dim=1)
    for each in (bank, reference):
        push(each, crowd)
    scans, resumed = [], []
    for search in range(20):
        scans.append(bank._unscanned == 0)
        assert_same_answers(bank, reference, crowd[search : search + 3], 5)
        if search == 10:  # a resumed run scans where this one does
            again.load_state_dict({name: value.clone() for name, value in bank.state_dict().items()})
        if search > 10:
            resumed.append(again._unscanned == 0)
            again.search(crowd[search : search + 3], 5)
    assert [number for number, scanned in enumerate(scans) if scanned] == [0, 16]
    assert resumed == scans[11:]


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_as_many_groups_are_listed_as_queries_need(kind: str) -> None:
    """Few where entries are far apart, more and more where they are not; a resumed run lists as many as this one."""
    bank, again = (create_scan_bank(kind, 20_000, 64, torch.float32, "cpu") for _ in range(2))
    push(bank, unit(20_000, 64))
    bank.search(unit(64, 64, seed=1), 5)
    assert bank._groups == 16  # type: ignore[attr-defined]
    push(bank, torch.nn.functional.normalize(unit(1, 64, seed=5) + 0.1 * unit(20_000, 64), dim=1))
    listed = []
    for seed in range(6):
        crowd = torch.nn.functional.normalize(unit(1, 64, seed=5) + 0.1 * unit(64, 64, seed), dim=1)
        found, repeated = bank.search(crowd, 5), bank.search(crowd, 5)
        assert torch.equal(found.slots, repeated.slots)
        again.load_state_dict({name: value.clone() for name, value in bank.state_dict().items()})
        for each in (bank, again):
            push_at_once(each, crowd)
        assert again._groups == bank._groups  # type: ignore[attr-defined]
        listed.append(bank._groups)  # type: ignore[attr-defined]
    assert listed[0] == 32
    assert 32 < listed[-1] <= 128


def test_ordinary_answers_are_proved() -> None:
    bank = Bf16ScanBank(20_000, 64)
    push(bank, clustered(20_000, 64))
    bank.search(clustered(256, 64, seed=5), 5)
    assert bank.metrics()["proved_ratio"] > 0.95


def test_what_was_proved_since_the_last_reading_is_saved() -> None:
    bank, again = Bf16ScanBank(3000, 32), Bf16ScanBank(3000, 32)
    push(bank, unit(3000, 32))
    bank.search(unit(9, 32, seed=1), 5)
    again.load_state_dict({name: value.clone() for name, value in bank.state_dict().items()})
    assert again.metrics() == bank.metrics()


def test_a_bfloat16_ring_is_scanned_itself() -> None:
    assert extra_bytes("bf16", 512, torch.bfloat16) == 0
    bank = Bf16ScanBank(100, 16, torch.bfloat16)
    assert bank._copy is bank._entries


# All kinds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_own_entry_comes_first(kind: str, dtype: torch.dtype) -> None:
    bank = create_scan_bank(kind, 6000, 32, dtype, "cpu")
    push(bank, clustered(5900, 32))
    own = clustered(700, 32, seed=3)
    push_at_once(bank, own)
    assert bank.age(bank.search(own, 3).slots)[:, 0].tolist() == list(range(699, -1, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_age", [0, 100, 1500, 4000])
def test_stale_entries_are_never_found(kind: str, max_age: int) -> None:
    bank = create_scan_bank(kind, 6000, 32, torch.float32, "cpu", max_age=max_age)
    push(bank, clustered(8000, 32))
    for _ in range(2):
        found = bank.search(clustered(40, 32, seed=2), 50)
        assert found.slots.shape == (40, min(50, max_age + 1))
        assert (bank.age(found.slots) <= max_age).all()
        assert all(len(set(row)) == len(row) for row in found.slots.tolist())
        push(bank, clustered(333, 32, seed=4))


@pytest.mark.parametrize("kind", KINDS)
def test_queries_that_are_not_numbers_do_not_crash(kind: str) -> None:
    bank = create_scan_bank(kind, 6000, 32, torch.float32, "cpu")
    push(bank, clustered(6000, 32))
    found = bank.search(torch.full((2, 32), torch.nan), 3)
    assert found.similarities.isnan().all()
    assert ((found.slots >= 0) & (found.slots < 6000)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bank_saved_in_mid_rotation_goes_on_with_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    bank, again = (create_scan_bank(kind, 5003, 20, dtype, "cpu") for _ in range(2))
    for seed in range(7):
        push(bank, clustered(1000, 20, seed))
    push(again, unit(5003, 20, seed=30))  # what it held before must not shine through
    again.load_state_dict({name: value.clone() for name, value in bank.state_dict().items()})
    for seed in range(3):
        more = clustered(256, 20, seed=20 + seed)
        for each in (bank, again):
            push(each, more)
        for left, right in zip(bank.search(more, 5), again.search(more, 5), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize("capacity", [100, 4500, 9000])
def test_a_bank_of_another_kind_and_capacity_is_taken_over(kind: str, saved: str, capacity: int) -> None:
    before, bank = (
        create_scan_bank(saved, 6000, 20, torch.float32, "cpu"),
        create_scan_bank(kind, capacity, 20, torch.float32, "cpu"),
    )
    reference = ReferenceBank(capacity, 20)
    push(before, clustered(7000, 20))
    for each in (bank, reference):
        each.load_state_dict(before.state_dict())
        push(each, clustered(300, 20, seed=1))
    queries = clustered(50, 20, seed=2)
    found, expected = bank.search(queries, 5), reference.search(queries, 5)
    assert (found.slots == expected.slots).double().mean() > 0.98
    assert (bank.age(found.slots) < len(bank)).all()


@pytest.mark.parametrize("kind", ["int8", "pq"])
@pytest.mark.parametrize("dim", [32, 50, 64])
def test_hardly_a_neighbour_is_missed(kind: str, dim: int) -> None:
    bank = create_scan_bank(kind, 20_000, dim, torch.float32, "cpu")
    assert isinstance(bank, ApproximateBank)
    for seed in range(6):
        push(bank, clustered(4000, dim, seed))
    assert recall(bank, clustered(256, dim, seed=9), 5) >= {"int8": 0.9999, "pq": 0.97}[kind]


def test_int8_finds_vectors_whose_energy_is_in_one_component() -> None:
    vectors = unit(8000, 48)
    vectors[:, 3] += 3
    bank = Int8ScanBank(8000, 48)
    push(bank, torch.nn.functional.normalize(vectors, dim=1))
    assert recall(bank, bank.reconstruct(torch.arange(100)), 5) > 0.999


@pytest.mark.parametrize("dim", [1, 2, 7, 16, 50, 512])
def test_mixing_keeps_products(dim: int) -> None:
    vectors = unit(40, dim)
    mixed = scan._mixed(vectors, scan._signs(dim))
    # Sums of 512 numbers in float32, twice.
    torch.testing.assert_close(mixed @ mixed.T, vectors @ vectors.T, rtol=0, atol=1e-5)
    assert torch.equal(scan._mixed(vectors[7:9], scan._signs(dim)), mixed[7:9])


@pytest.mark.parametrize("kind", ["int8", "pq"])
def test_a_bank_that_improves_again_and_again_searches_exactly(kind: str) -> None:
    bank, reference = create_scan_bank(kind, 6000, 64, torch.float32, "cpu"), ReferenceBank(6000, 64)
    assert isinstance(bank, ApproximateBank)
    for each in (bank, reference):
        push(each, unit(6000, 64))
    said = [bank.raise_recall() for _ in range(4)]
    assert "2 times as many" in said[0]
    assert "searches exactly" in said[-1]
    again = create_scan_bank(kind, 6000, 64, torch.float32, "cpu")
    again.load_state_dict(bank.state_dict())
    for each in (bank, again):
        assert_same_answers(each, reference, unit(64, 64, seed=1), 5)
    assert "searches exactly" in again.raise_recall()


def test_what_int8_misses_a_greater_effort_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """All entries within what 8 bits can tell apart: only comparing more of them helps."""
    monkeypatch.setattr(scan, "_GROUPS", 16)
    centre = unit(1, 64, seed=5)
    bank = Int8ScanBank(6000, 64)
    push(bank, torch.nn.functional.normalize(centre + 0.02 * unit(6000, 64), dim=1))
    queries = torch.nn.functional.normalize(centre + 0.02 * unit(100, 64, seed=1), dim=1)
    before = recall(bank, queries, 5)
    bank.raise_recall()
    bank.raise_recall()
    assert before < recall(bank, queries, 5)


# pq


def assert_codes_follow(bank: PqScanBank) -> None:
    """Every slot decodes to what its ring row is encoded to."""
    assert bank._codes is not None
    assert bank._codes.covered == len(bank)
    for codes in (bank._codes, bank._coming):
        if codes is not None:
            index = codes._index
            assert index.ntotal == codes.covered
            expected = index.sa_decode(index.sa_encode(scan._padded_rows(bank._entries[: codes.covered], index.d)))
            decoded = np.stack([index.reconstruct(slot) for slot in range(codes.covered)])
            assert np.array_equal(decoded, expected)


@pytest.mark.parametrize("capacity", [4096, 4100, 4999])
@pytest.mark.parametrize("dim", [16, 18])
def test_codes_follow_the_ring_through_rotations(capacity: int, dim: int) -> None:
    bank = PqScanBank(capacity, dim)
    for seed in range(40):
        push_at_once(bank, unit([1, 31, 256, 700, 1024][seed % 5], dim, seed))
    assert bank.pushed > 3 * capacity
    assert_codes_follow(bank)


def test_code_books_are_learnt_anew_when_the_entries_have_changed() -> None:
    bank = PqScanBank(5000, 16)
    push(bank, unit(5000, 16))
    push(bank, unit(3000, 16, seed=1))
    learnt = bank._index_state()["pq.codes.books"]
    assert "learnt anew" in bank.raise_recall()
    assert torch.equal(learnt, bank._index_state()["pq.codes.books"])
    push_at_once(bank, unit(700, 16, seed=2))
    assert not torch.equal(learnt, bank._index_state()["pq.codes.books"])
    assert_codes_follow(bank)
    assert "2 times as many" in bank.raise_recall()


def test_new_code_books_encode_a_few_entries_a_push_and_search_when_they_have_all() -> None:
    bank = PqScanBank(5000, 16)
    push(bank, unit(8000, 16))
    assert "learnt anew" in bank.raise_recall()
    learnt = bank._index_state()["pq.codes.books"]
    for seed in range(6):
        push_at_once(bank, unit(100, 16, seed))
        assert bank._index_state()["pq.coming.covered"] == (seed + 1) * 800
        assert_codes_follow(bank)
    again = PqScanBank(5000, 16)
    again.load_state_dict(bank.state_dict())
    for each in (bank, again):
        push_at_once(each, unit(100, 16, 7))
        assert not torch.equal(learnt, each._index_state()["pq.codes.books"])
        assert_codes_follow(each)
    assert torch.equal(*(each._index_state()["pq.codes.books"] for each in (bank, again)))


def test_pq_names_what_runs_on_cuda() -> None:
    with pytest.raises(ValueError, match="CPU only; on cuda choose bf16 or int8"):
        PqScanBank(100, 16, device="cuda")


def test_a_dtype_that_no_copy_is_made_of_is_named() -> None:
    with pytest.raises(ValueError, match=r"found torch\.float64"):
        create_scan_bank("bf16", 100, 16, torch.float64, "cpu")


@pytest.mark.parametrize(("kind", "bytes_"), [("bf16", 1028), ("int8", 512), ("pq", 43)])
def test_the_bytes_beside_the_ring_are_told(kind: str, bytes_: int) -> None:
    assert math.isclose(extra_bytes(kind, 512, torch.float32), bytes_)
