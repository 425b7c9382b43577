"""The contract of `Bank`: every kind of bank against a deque."""

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from banks import ON_CPU, PLACES, BankKind, count_indexed_queries
from oracle import DIM, Oracle, assert_agree, unit

from msf_faiss.bank import Bank
from msf_faiss.search.arguments import VectorError
from msf_faiss.search.faiss_setup import set_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test for every kind of bank, on all its devices if the test takes a device, otherwise on the CPU."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize(("kind", "device"), PLACES)
    elif "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", ON_CPU, ids=str)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def push_in_parts(bank: Bank, vectors: torch.Tensor, size: int) -> None:
    """Push parts, because banks search their last push exactly."""
    for part in vectors.split(size):
        bank.push(part, torch.arange(bank.pushed, bank.pushed + len(part)))


@pytest.mark.parametrize(
    ("capacity", "batch", "dtype"),
    [
        (1, 1, torch.float16),
        (1, 3, torch.float32),
        (2, 1, torch.bfloat16),
        (2, 64, torch.float32),
        (7, 1, torch.float32),
        (7, 3, torch.bfloat16),
        (7, 65, torch.float16),
        (64, 1, torch.float32),
        (64, 3, torch.float16),
        (64, 64, torch.float32),
        (64, 65, torch.bfloat16),
        (64, 200, torch.float32),
    ],
    ids=str,
)
def test_bank_is_a_fifo(kind: BankKind, capacity: int, batch: int, dtype: torch.dtype, device: str) -> None:
    rng = np.random.default_rng(0)
    bank, oracle = kind(capacity, DIM, dtype, device), Oracle(capacity, dtype)
    next_id = 1000
    for size in [batch, 1, batch, max(1, batch - 1), batch + 1]:
        embeddings, ids = unit(rng, size), torch.arange(next_id, next_id + size)
        next_id += size
        bank.push(embeddings.to(device), ids.to(device))
        oracle.push(embeddings, ids)
        assert len(bank) == len(oracle.entries)
        assert bank.pushed == oracle.pushed
        queries = torch.cat([embeddings[-3:], unit(rng, 4)])
        for k in [1, 5, 40]:
            assert_agree(bank, oracle, queries, k, exact=kind.exact)


@pytest.mark.parametrize("max_age", [None, 0, 3])
def test_empty_bank_returns_no_neighbors(kind: BankKind, device: str, max_age: int | None) -> None:
    bank = kind(8, DIM, torch.float32, device, max_age=max_age)
    found = bank.search(unit(np.random.default_rng(0), 3).to(device), 5)
    assert found.similarities.shape == found.slots.shape == (3, 0)
    assert len(bank) == 0


def test_empty_push_and_empty_search(kind: BankKind, device: str) -> None:
    bank = kind(8, DIM, torch.float32, device)
    bank.push(torch.empty(0, DIM, device=device), torch.empty(0, dtype=torch.int64, device=device))
    assert len(bank) == 0
    bank.push(unit(np.random.default_rng(0), 3).to(device), torch.arange(3, device=device))
    assert bank.search(torch.empty(0, DIM, device=device), 2).slots.shape == (0, 2)


@pytest.mark.parametrize(
    ("copies", "dtype"), [(2, torch.float16), (9, torch.float32), (20, torch.bfloat16), (300, torch.float32)], ids=str
)
def test_duplicates_come_youngest_first(kind: BankKind, copies: int, dtype: torch.dtype) -> None:
    """Also with more copies than the engine proposes."""
    rng = np.random.default_rng(1)
    bank, oracle = kind(400, DIM, dtype, "cpu"), Oracle(400, dtype)
    twin = unit(rng, 1)
    for embeddings in [twin.expand(copies, -1), unit(rng, 50), twin, unit(rng, 60), unit(rng, 30)]:
        ids = torch.arange(len(embeddings))
        bank.push(embeddings, ids)
        oracle.push(embeddings, ids)
    assert_agree(bank, oracle, torch.cat([twin, unit(rng, 2)]), 5, exact=kind.exact)
    assert_agree(bank, oracle, twin, 12, exact=kind.exact)


def test_identical_entries_come_youngest_first(kind: BankKind) -> None:
    rng = np.random.default_rng(2)
    bank, oracle = kind(500, DIM), Oracle(500, torch.float32)
    same = unit(rng, 1).expand(700, -1)
    bank.push(same, torch.arange(700))
    oracle.push(same, torch.arange(700))
    assert_agree(bank, oracle, same[:2], 10, exact=kind.exact)


def test_own_entry_comes_first(kind: BankKind, dtype: torch.dtype, device: str) -> None:
    """Queries are rounded like entries, so an embedding equals its own entry in every dtype."""
    rng = np.random.default_rng(3)
    bank = kind(300, DIM, dtype, device)
    bank.push(unit(rng, 280).to(device), torch.arange(280, device=device))
    embeddings = unit(rng, 50).to(device)
    bank.push(embeddings, torch.arange(50, device=device))
    with count_indexed_queries() as counts:
        found = bank.search(embeddings, 3)
    assert bank.age(found.slots)[:, 0].tolist() == list(range(49, -1, -1))
    assert sum(counts) == (50 if kind.indexed else 0)


@pytest.mark.parametrize("filled", [3, 40])
def test_search_ignores_unfilled_slots(kind: BankKind, filled: int) -> None:
    bank, query = kind(50, DIM), torch.ones(1, DIM) / DIM**0.5
    # Less similar to the query than the zeros in empty slots.
    entries = torch.nn.functional.normalize(0.5 * unit(np.random.default_rng(15), filled) - query, dim=1)
    push_in_parts(bank, entries, 4)
    with count_indexed_queries() as counts:
        for k in (5, 50):
            slots = bank.search(query, k).slots[0].tolist()
            assert set(slots) <= set(range(filled))
            assert len(set(slots)) == min(k, filled)
    assert not kind.indexed or filled == 3 or sum(counts) > 0


def broken_rows(rows: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what is wrong with one of the rows, and copies of the rows of which one is broken."""
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = rows.clone()
        broken[2, 5] = value
        yield "row 2 is not finite", broken
    for norm in (1e20, 4.0, 1.05, 0.95, 1e-3):
        broken = rows.clone()
        broken[2] *= norm
        yield r"row 2 has norm [\d.e+-]+ \(1 such of 3 rows\); torch.nn.functional.normalize", broken


def test_rows_that_are_not_finite_or_not_unit_are_refused(kind: BankKind, dtype: torch.dtype) -> None:
    """At every door, and nothing stays of them: the bank is the same as one that never saw them."""
    rng = np.random.default_rng(16)
    bank, clean, oracle = kind(50, DIM, dtype), kind(50, DIM, dtype), Oracle(50, dtype)
    for step in range(20):
        rows, ids = unit(rng, 3), torch.arange(3)
        for what, broken in broken_rows(rows) if step in (0, 19) else ():
            with pytest.raises(VectorError, match=f"embeddings must be finite and have unit norm, but {what}"):
                bank.push(broken.double() if step else broken, ids)
            for search in (bank.search, bank.search_exactly):
                with pytest.raises(VectorError, match=f"queries must be finite and have unit norm, but {what}"):
                    search(broken.bfloat16() if step else broken, 5)
            with pytest.raises(VectorError, match="60 such of 60 rows"):
                bank.push(2 * unit(np.random.default_rng(22), 60), torch.arange(60))
        for each in (bank, clean, oracle):
            each.push(rows, ids)
    assert_agree(bank, oracle, rows, 5, exact=kind.exact)
    clean.search(rows, 5)
    state, expected = bank.state_dict(), clean.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert bank.metrics() == clean.metrics()
    for _, broken in broken_rows(state["embeddings"][:3].clone()):
        with pytest.raises(VectorError, match="the saved entries must be finite and have unit norm, but row 2"):
            bank.load_state_dict({**state, "embeddings": torch.cat([broken, state["embeddings"][3:]])})
    assert_agree(bank, oracle, rows, 5, exact=kind.exact)


def test_masked_rows_are_counted(kind: BankKind, dtype: torch.dtype) -> None:
    """As on CUDA and on several ranks: they become zeros, and as queries they have similarities of NaN."""
    rng = np.random.default_rng(23)
    bank, oracle, ids = kind(50, DIM, dtype), Oracle(50, dtype), torch.arange(20)
    getattr(bank, "_local", bank).masks = True
    for _ in range(5):
        rows = unit(rng, 20)
        broken = rows.clone()
        broken[3, 2], broken[5, 1], broken[7] = torch.nan, -torch.inf, 2 * rows[7]
        rows[[3, 5, 7]] = 0
        bank.push(broken, ids)
        oracle.push(rows, ids)
        assert_agree(bank, oracle, rows, 5, exact=kind.exact)
        masked, zeros = bank.search(broken, 5), bank.search(rows, 5)
        assert masked.similarities.isnan().all(dim=1).nonzero().flatten().tolist() == [3, 5, 7]
        assert torch.equal(masked.slots, zeros.slots)
    assert bank.metrics()["masked_rows"] == 15
    assert "masked_rows" not in bank.metrics()


def test_rows_of_almost_unit_norm_and_zeros_are_accepted(kind: BankKind, dtype: torch.dtype) -> None:
    """A norm in bfloat16 is off by up to 2^-8, and torch's normalize leaves a vector of zeros as it is."""
    rng = np.random.default_rng(17)
    bank, oracle = kind(60, DIM, dtype), Oracle(60, dtype)
    for norm in (0.99, 1.01, 1.0, 0.0, 1.0):
        for rows in (norm * unit(rng, 20)).split(4):
            for each in (bank, oracle):
                each.push(rows, torch.arange(4))
    assert_agree(bank, oracle, torch.cat([1.01 * unit(rng, 3), torch.zeros(1, DIM)]), 5, exact=kind.exact)
    own = bank.newest(4)
    assert bank.search(bank.reconstruct(own), 1).slots[:, 0].tolist() == own.tolist()


def test_results_do_not_depend_on_batch_size(kind: BankKind, dtype: torch.dtype) -> None:
    """FAISS computes small batches differently."""
    rng = np.random.default_rng(4)
    bank = kind(2000, 64, dtype)
    push_in_parts(bank, unit(rng, 2000, 64), 200)
    queries, batches = unit(rng, 256, 64), [1, 64, 249, 250]
    with count_indexed_queries() as counts:
        whole = bank.search(queries, 5)
        for batch in batches:
            part = bank.search(queries[:batch], 5)
            assert torch.equal(whole.slots[:batch], part.slots)
            assert torch.equal(whole.similarities[:batch], part.similarities)
    assert counts == ([256, *batches] if kind.indexed else [])


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_strided_transposed_and_grad_inputs(kind: BankKind, given: torch.dtype, dtype: torch.dtype) -> None:
    """As a training step has them, also in the dtype of an autocast forward."""
    rng = np.random.default_rng(5)
    wide = torch.stack([unit(rng, 40), unit(rng, 40)], dim=2).flatten(1).to(given)
    embeddings = wide[:, ::2].clone().requires_grad_() * 1.0
    bank, oracle = kind(30, DIM, dtype), Oracle(30, dtype)
    for each in (bank, oracle):
        each.push(embeddings[::2], torch.arange(40)[::2])
    queries = embeddings[1::2]
    plain = queries.detach().contiguous().clone()
    assert_agree(bank, oracle, plain, 4, exact=kind.exact)
    expected = bank.search(plain, 4)
    for same in (queries, wide[1::2, ::2], plain.T.contiguous().T, plain.flip(0).flip(0)):
        found = bank.search(same, 4)
        assert torch.equal(found.slots, expected.slots)
        assert torch.equal(found.similarities, expected.similarities)
        assert not found.similarities.requires_grad
    assert not bank.reconstruct(expected.slots).requires_grad
    assert not bank.mean_of(expected.slots).requires_grad


def test_push_copies_vectors(kind: BankKind) -> None:
    bank = kind(10, DIM)
    embeddings = unit(np.random.default_rng(6), 4)
    kept = embeddings.clone()
    bank.push(embeddings, torch.arange(4))
    embeddings.zero_()
    assert torch.equal(bank.reconstruct(torch.arange(4)), kept)


@pytest.mark.parametrize(
    ("pushes", "dtype"),
    [
        ([5], torch.float16),
        ([10], torch.bfloat16),
        ([12], torch.float32),
        ([7] * 3, torch.bfloat16),
        ([25], torch.float32),
    ],
    ids=str,
)
def test_state_dict_round_trip(kind: BankKind, pushes: list[int], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(7)
    bank = kind(10, DIM, dtype)
    for size in pushes:
        bank.push(unit(rng, size), torch.arange(size))
    again = kind(10, DIM, dtype)
    again.push(unit(rng, 4), torch.arange(4))  # must be overwritten
    again.load_state_dict({name: value.clone() for name, value in bank.state_dict().items()})
    more, queries = unit(rng, 3), unit(rng, 6)
    for each in (bank, again):
        each.push(more, torch.arange(3))
    assert (len(again), again.pushed) == (len(bank), bank.pushed)
    for left, right in zip(bank.search(queries, 10), again.search(queries, 10), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("capacity", [1, 4, 10, 16])
def test_load_into_other_capacity_keeps_newest(kind: BankKind, capacity: int) -> None:
    rng = np.random.default_rng(8)
    for pushed in (0, 3, 10, 25):
        bank, resized, before = kind(10, DIM), kind(capacity, DIM), Oracle(10, torch.float32)
        for each in (bank, before):
            each.push(unit(np.random.default_rng(9), pushed), torch.arange(pushed))
        resized.load_state_dict(bank.state_dict())
        assert len(resized) == min(pushed, capacity, 10)
        # Same ages and ids as in a new bank with these entries, also after more pushes.
        oracle = before.resized(capacity, resized.pushed)
        assert_agree(resized, oracle, unit(rng, 3), 10, exact=kind.exact)
        more = unit(rng, 7)
        resized.push(more, torch.arange(100, 107))
        oracle.push(more, torch.arange(100, 107))
        assert_agree(resized, oracle, more, 5, exact=kind.exact)


def test_load_into_other_dtype_rounds(kind: BankKind, dtype: torch.dtype) -> None:
    """Saved mid-rotation, with the oldest entry in the middle of the ring."""
    rng = np.random.default_rng(10)
    for before in DTYPES:
        bank, saved, oracle = kind(10, DIM, dtype), kind(10, DIM, before), Oracle(10, dtype)
        entries = unit(rng, 14)
        saved.push(entries, torch.arange(14))
        bank.load_state_dict(saved.state_dict())
        oracle.push(entries.to(before), torch.arange(14))
        for each in (bank, oracle):
            each.push(entries[:3], torch.arange(3))
        assert_agree(bank, oracle, unit(rng, 3), 10, exact=kind.exact)


@pytest.mark.parametrize("before", ON_CPU, ids=str)
def test_load_state_of_other_kind(kind: BankKind, before: BankKind) -> None:
    rng = np.random.default_rng(11)
    saved, full = before(10, DIM), Oracle(10, torch.float32)
    for size in (7, 8, 9):
        entries = unit(rng, size)
        for each in (saved, full):
            each.push(entries, torch.arange(size))
    for capacity in (6, 10, 15):
        bank = kind(capacity, DIM)
        bank.load_state_dict(saved.state_dict())
        oracle = full.resized(capacity, bank.pushed)
        for each in (bank, oracle):
            each.push(entries[:4], torch.arange(4))
        assert_agree(bank, oracle, unit(rng, 5), 8, exact=kind.exact)


@pytest.mark.parametrize("size", [1, 3, 9, 10])
@pytest.mark.parametrize("max_age", [0, 4, 8, 9])
def test_search_respects_max_age(kind: BankKind, max_age: int, size: int, device: str) -> None:
    """Empty, partly filled, full and wrapped around; with a max_age below and above the capacity."""
    rng = np.random.default_rng(12)
    bank, oracle = kind(9, DIM, torch.float32, device, max_age=max_age), Oracle(9, torch.float32, max_age)
    for _ in range(13):
        entries, ids = unit(rng, size), torch.arange(size)
        bank.push(entries.to(device), ids.to(device))
        oracle.push(entries, ids)
        queries = torch.cat([entries[-2:], unit(rng, 2)])
        for k in (1, 4, 12):
            assert_agree(bank, oracle, queries, k, exact=kind.exact)
        assert (bank.age(bank.search(queries.to(device), 12).slots) <= max_age).all()


def test_max_age_does_not_drop_entries_from_state(kind: BankKind) -> None:
    """Entries beyond max_age are only hidden from searches."""
    rng = np.random.default_rng(13)
    strict, open_bank, oracle = kind(9, DIM, max_age=2), kind(9, DIM), Oracle(9, torch.float32)
    entries = unit(rng, 12)
    for each in (strict, oracle):
        each.push(entries, torch.arange(12))
    open_bank.load_state_dict(strict.state_dict())
    assert_agree(open_bank, oracle, entries, 9, exact=kind.exact)


def test_mean_of(kind: BankKind, dtype: torch.dtype, device: str) -> None:
    rng = np.random.default_rng(14)
    bank = kind(20, DIM, dtype, device)
    bank.push(unit(rng, 20).to(device), torch.arange(20, device=device))
    for k in (1, 2, 5, 20):
        slots = torch.from_numpy(rng.integers(0, 20, (6, k))).to(device)  # repeats some slots
        mean = bank.mean_of(slots)
        assert mean.shape == (6, DIM)
        assert mean.dtype == torch.float32
        # A float32 mean of at most 20 numbers below 1 in size.
        torch.testing.assert_close(mean, bank.reconstruct(slots).double().mean(dim=1).float(), rtol=0, atol=5e-7)
    assert torch.equal(bank.mean_of(slots[:, :1]), bank.reconstruct(slots[:, 0]))
    assert bank.mean_of(slots[:0]).shape == (0, DIM)
    with pytest.raises(ValueError, match="cannot average zero neighbours"):
        bank.mean_of(slots[:, :0])


def test_integers_of_numpy_are_integers(kind: BankKind) -> None:
    bank = kind(np.int64(40), np.int32(DIM), max_age=np.uint8(30))
    rows = unit(np.random.default_rng(18), 36)
    push_in_parts(bank, rows, 9)
    expected = bank.search(rows, 5)
    for k in (np.int64(5), np.uint8(5), np.array(5), torch.tensor(5)):
        for search in (bank.search, bank.search_exactly):
            assert search(rows, k).slots.shape == (36, 5)
        assert torch.equal(bank.search(rows, k).slots, expected.slots)
    assert bank.search(rows, 10**30).slots.shape == (36, 31)
    assert all(type(value) is int for value in (bank.capacity, bank.dim))


def test_invalid_k_raises_value_error(kind: BankKind) -> None:
    bank, rows = kind(10, DIM), unit(np.random.default_rng(19), 3)
    bank.push(rows, torch.arange(3))
    no_integers = [5.0, np.float32(5), None, "5", [5], np.array([5, 6]), torch.tensor(5.0), torch.tensor([5, 6])]
    for k in (0, np.int64(-3), *no_integers):
        words = "must be at least 1, found" if isinstance(k, int | np.integer) else "must be an integer, found"
        for search in (bank.search, bank.search_exactly):
            with pytest.raises(ValueError, match=f"k {words}"):
                search(rows, k)


def test_invalid_vectors_and_slots_raise_value_error(kind: BankKind) -> None:
    bank, ids, rows = kind(10, DIM), torch.arange(3), unit(np.random.default_rng(20), 3)
    bank.push(rows, ids)
    wrong: list[tuple[object, str]] = [
        (rows.numpy(), r"must be a dense torch tensor, found numpy\.ndarray"),
        (rows.tolist(), "must be a dense torch tensor, found builtins.list"),
        (None, "must be a dense torch tensor, found builtins.NoneType"),
        (rows.to_sparse(), r"must be a dense torch tensor, found torch\.sparse_coo"),
        (rows[0], r"must be \[\*, 16\], found \[16\]"),
        (rows[:, :8], r"must be \[\*, 16\], found \[3, 8\]"),
        (rows.unsqueeze(0), r"must be \[\*, 16\], found \[1, 3, 16\]"),
        (rows.long(), "must be floating point, of 16 bits or more, found torch.int64"),
        (rows.bool(), "must be floating point, of 16 bits or more, found torch.bool"),
        (rows.cfloat(), "must be floating point, of 16 bits or more, found torch.complex64"),
        (rows.to(torch.float8_e4m3fn), "must be floating point, of 16 bits or more, found torch.float8_e4m3fn"),
        (rows.to("meta"), "are on meta, the bank is on cpu"),
    ]
    for vectors, message in wrong:
        for search in (bank.search, bank.search_exactly):
            with pytest.raises(ValueError, match=f"queries {message}"):
                search(vectors, 1)
        with pytest.raises(ValueError, match=f"embeddings {message}"):
            bank.push(vectors, ids)
    for other in (ids.numpy(), ids.tolist(), range(3), None):
        with pytest.raises(ValueError, match="ids must be a dense torch tensor"):
            bank.push(rows, other)
    for other in (ids[:2], ids.int(), ids.float(), ids.unsqueeze(1), ids.to("meta")):
        with pytest.raises(ValueError, match=r"ids must be \[3\] int64 on cpu"):
            bank.push(rows, other)
    slots = bank.search(rows, 2).slots
    for look_up in (bank.mean_of, bank.reconstruct, bank.ids):
        with pytest.raises(ValueError, match=r"slots must be a dense torch tensor, found numpy\.ndarray"):
            look_up(slots.numpy())
        with pytest.raises(ValueError, match=r"slots must be int64 on cpu, found torch\.float32"):
            look_up(slots.float())
    with pytest.raises(ValueError, match=r"slots must be \[B, K\], found \[3\]"):
        bank.mean_of(slots[:, 0])
    assert bank.pushed == 3


def test_invalid_states_and_sizes_raise_value_error(kind: BankKind) -> None:
    bank, ids = kind(10, DIM), torch.arange(3)
    embeddings = unit(np.random.default_rng(9), 3)
    with pytest.raises(ValueError, match="capacity must be at least 1, found 0"):
        kind(0, DIM)
    with pytest.raises(ValueError, match=r"dim must be an integer, found 16\.0"):
        kind(10, 16.0)
    with pytest.raises(ValueError, match="float"):
        kind(4, DIM, torch.int64)
    bank.push(embeddings, ids)
    state = bank.state_dict()
    with pytest.raises(ValueError, match="this bank needs"):
        kind(10, DIM + 1).load_state_dict(state)
    with pytest.raises(ValueError, match="not the state of a bank"):
        bank.load_state_dict({"queue": embeddings})
    with pytest.raises(ValueError, match="not the state of a bank"):
        bank.load_state_dict({name: value for name, value in state.items() if name != "ids"})
    with pytest.raises(ValueError, match="this bank needs"):
        bank.load_state_dict({**state, "embeddings": embeddings[0]})
    with pytest.raises(ValueError, match="inconsistent"):
        bank.load_state_dict({**state, "ids": torch.arange(2)})
    with pytest.raises(ValueError, match=r"inconsistent: 3 entries, .* 2 pushed"):
        bank.load_state_dict({**state, "pushed": torch.tensor(2)})
    assert len(bank) == 3
    assert torch.equal(bank.reconstruct(torch.arange(3)), embeddings)
    with pytest.raises(ValueError, match="max_age must be at least 0, found -1"):
        kind(4, DIM, max_age=-1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_can_search(kind: BankKind) -> None:
    """It has none of the threads that its parent's search has started."""
    threads, rows = torch.get_num_threads(), unit(np.random.default_rng(21), 3000)
    set_threads(2)
    try:
        bank = kind(3000, DIM)
        push_in_parts(bank, rows, 500)
        expected = bank.search(rows[:64], 5).slots
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if torch.equal(bank.search(rows[:64], 5).slots, expected) else 1)
            finally:
                os._exit(2)
        deadline = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.005)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended == (child, 0)
        assert torch.get_num_threads() == 2
    finally:
        set_threads(threads)
