"""Every bank against a deque: what a FIFO bank is, written down as slowly and plainly as possible."""

from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from msf_faiss.bank import Bank, FlatBank, ReferenceBank

DIM = 16
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
Make = Callable[..., Bank]


class Oracle:
    """A deque of (sequence number, vector as stored, id), and a search that sorts all of it."""

    def __init__(self, capacity: int, dtype: torch.dtype) -> None:
        self.entries: deque[tuple[int, Tensor, int]] = deque(maxlen=capacity)
        self.capacity, self.dtype, self.pushed = capacity, dtype, 0

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        for embedding, index in zip(embeddings.cpu().to(self.dtype), ids.tolist(), strict=True):
            self.entries.append((self.pushed, embedding, index))
            self.pushed += 1

    def search(self, query: Tensor, k: int) -> list[tuple[float, int, int, int]]:
        """(similarity, slot, id, age) of the best k, ties youngest first."""
        stored = query.cpu().to(self.dtype).double()
        scored = [
            (float((stored * vector.double()).sum().float()), -self.pushed + 1 + number, number, index)
            for number, vector, index in self.entries
        ]
        scored.sort(reverse=True)
        return [(s, number % self.capacity, index, -negative_age) for s, negative_age, number, index in scored[:k]]


@pytest.fixture(params=[ReferenceBank, FlatBank], ids=["reference", "flat"])
def kind(request: pytest.FixtureRequest) -> type[Bank]:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def unit(rng: np.random.Generator, rows: int, dim: int = DIM) -> Tensor:
    vectors = torch.from_numpy(rng.standard_normal((rows, dim)).astype(np.float32))
    return torch.nn.functional.normalize(vectors, dim=1)


def assert_agree(bank: Bank, oracle: Oracle, queries: Tensor, k: int) -> None:
    found = bank.search(queries.to(bank.device), k)
    kept = min(k, len(oracle.entries))
    assert found.similarities.shape == found.slots.shape == (len(queries), kept)
    assert found.similarities.dtype == torch.float32
    assert found.slots.dtype == torch.int64
    ids, ages, vectors = bank.ids(found.slots), bank.age(found.slots), bank.reconstruct(found.slots)
    stored = {number % oracle.capacity: vector for number, vector, _ in oracle.entries}
    for row, query in enumerate(queries):
        expected = oracle.search(query, k)
        assert found.slots[row].tolist() == [slot for _, slot, _, _ in expected]
        assert found.similarities[row].tolist() == [similarity for similarity, _, _, _ in expected]
        assert ids[row].tolist() == [index for _, _, index, _ in expected]
        assert ages[row].tolist() == [age for _, _, _, age in expected]
        for place, (_, slot, _, _) in enumerate(expected):
            assert torch.equal(vectors[row, place].cpu(), stored[slot].float())
    if kept:
        mean = torch.stack([vectors[row].double().mean(dim=0) for row in range(len(queries))])
        # A mean of at most 40 float32 numbers below 1 in size.
        torch.testing.assert_close(bank.mean_of(found.slots).double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("capacity", [1, 2, 7, 64])
@pytest.mark.parametrize("batch", [1, 3, 64, 65, 200])
def test_a_bank_is_a_fifo(kind: Make, capacity: int, batch: int, dtype: torch.dtype, device: str) -> None:
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
            assert_agree(bank, oracle, queries, k)


def test_an_empty_bank_finds_nothing(kind: Make, device: str) -> None:
    bank = kind(8, DIM, torch.float32, device)
    found = bank.search(unit(np.random.default_rng(0), 3).to(device), 5)
    assert found.similarities.shape == found.slots.shape == (3, 0)
    assert len(bank) == 0


def test_no_queries_and_no_pushes(kind: Make, device: str) -> None:
    bank = kind(8, DIM, torch.float32, device)
    bank.push(torch.empty(0, DIM, device=device), torch.empty(0, dtype=torch.int64, device=device))
    assert len(bank) == 0
    bank.push(unit(np.random.default_rng(0), 3).to(device), torch.arange(3, device=device))
    assert bank.search(torch.empty(0, DIM, device=device), 2).slots.shape == (0, 2)


@pytest.mark.parametrize("copies", [2, 9, 20, 300])
def test_duplicates_come_youngest_first(kind: Make, copies: int, dtype: torch.dtype) -> None:
    """More copies than FAISS is asked for: the youngest must be found all the same."""
    rng = np.random.default_rng(1)
    bank, oracle = kind(400, DIM, dtype, "cpu"), Oracle(400, dtype)
    twin = unit(rng, 1)
    for embeddings in [twin.expand(copies, -1), unit(rng, 50), twin, unit(rng, 60), unit(rng, 30)]:
        ids = torch.arange(len(embeddings))
        bank.push(embeddings, ids)
        oracle.push(embeddings, ids)
    assert_agree(bank, oracle, torch.cat([twin, unit(rng, 2)]), 5)
    assert_agree(bank, oracle, twin, 12)


def test_a_collapsed_encoder_is_searched_in_order(kind: Make) -> None:
    rng = np.random.default_rng(2)
    bank, oracle = kind(500, DIM), Oracle(500, torch.float32)
    same = unit(rng, 1).expand(700, -1)
    bank.push(same, torch.arange(700))
    oracle.push(same, torch.arange(700))
    assert_agree(bank, oracle, same[:2], 10)


def test_the_own_entry_comes_first(kind: Make, dtype: torch.dtype, device: str) -> None:
    """A query is compared as the ring would store it, so its own entry is the same vector in every dtype."""
    rng = np.random.default_rng(3)
    bank = kind(300, DIM, dtype, device)
    bank.push(unit(rng, 280).to(device), torch.arange(280, device=device))
    embeddings = unit(rng, 50).to(device)
    bank.push(embeddings, torch.arange(50, device=device))
    found = bank.search(embeddings, 3)
    assert bank.age(found.slots)[:, 0].tolist() == list(range(49, -1, -1))


def test_nothing_is_ever_returned_from_an_unfilled_slot(kind: Make) -> None:
    bank = kind(50, DIM)
    entries = -torch.ones(3, DIM) / DIM**0.5  # further from the query than the zeros of empty slots
    bank.push(entries, torch.arange(3))
    found = bank.search(torch.ones(1, DIM) / DIM**0.5, 10)
    assert sorted(found.slots[0].tolist()) == [0, 1, 2]


def test_queries_that_are_not_numbers_do_not_crash(kind: Make) -> None:
    bank = kind(50, DIM)
    bank.push(unit(np.random.default_rng(0), 50), torch.arange(50))
    found = bank.search(torch.full((2, DIM), torch.nan), 3)
    assert found.similarities.isnan().all()
    assert ((found.slots >= 0) & (found.slots < 50)).all()


@pytest.mark.parametrize("batch", [1, 64, 249, 250, 256])
def test_the_batch_size_of_a_search_changes_nothing(kind: Make, batch: int) -> None:
    """FAISS takes another path for small batches; the bits must not show it."""
    rng = np.random.default_rng(4)
    bank = kind(2000, 64)
    bank.push(unit(rng, 2000, 64), torch.arange(2000))
    queries = unit(rng, 256, 64)
    whole, part = bank.search(queries, 5), bank.search(queries[:batch], 5)
    assert torch.equal(whole.slots[:batch], part.slots)
    assert torch.equal(whole.similarities[:batch], part.similarities)


def test_inputs_as_a_training_step_has_them(kind: Make) -> None:
    """Strided, with gradients, in half precision."""
    rng = np.random.default_rng(5)
    wide = unit(rng, 20, 2 * DIM)
    embeddings = wide[:, ::2].clone().requires_grad_() * 1.0
    bank = kind(30, DIM)
    bank.push(embeddings[::2], torch.arange(20)[::2])
    strided = bank.search(wide[:, ::2], 4)
    assert torch.equal(strided.slots, bank.search(wide[:, ::2].contiguous(), 4).slots)
    assert not bank.reconstruct(strided.slots).requires_grad
    assert bank.search(wide[:, ::2].bfloat16(), 4).slots.shape == (20, 4)


def test_the_pushed_vectors_are_copied(kind: Make) -> None:
    bank = kind(10, DIM)
    embeddings = unit(np.random.default_rng(6), 4)
    kept = embeddings.clone()
    bank.push(embeddings, torch.arange(4))
    embeddings.zero_()
    assert torch.equal(bank.reconstruct(torch.arange(4)), kept)


@pytest.mark.parametrize("pushes", [[5], [10], [12], [7, 7, 7], [25]])
def test_a_saved_bank_is_the_same_bank(kind: Make, pushes: list[int], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(7)
    bank = kind(10, DIM, dtype)
    for size in pushes:
        bank.push(unit(rng, size), torch.arange(size))
    again = kind(10, DIM, dtype)
    again.push(unit(rng, 4), torch.arange(4))  # what it held before must not shine through
    again.load_state_dict({name: value.clone() for name, value in bank.state_dict().items()})
    more, queries = unit(rng, 3), unit(rng, 6)
    for each in (bank, again):
        each.push(more, torch.arange(3))
    assert (len(again), again.pushed) == (len(bank), bank.pushed)
    for left, right in zip(bank.search(queries, 10), again.search(queries, 10), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("pushed", [0, 3, 10, 25])
@pytest.mark.parametrize("capacity", [1, 4, 10, 16])
def test_a_bank_of_another_capacity_keeps_the_newest(kind: Make, pushed: int, capacity: int) -> None:
    rng = np.random.default_rng(8)
    bank, resized = kind(10, DIM), kind(capacity, DIM)
    embeddings = unit(rng, pushed)
    bank.push(embeddings, torch.arange(pushed))
    resized.load_state_dict(bank.state_dict())
    kept = min(pushed, capacity, 10)
    assert len(resized) == kept
    # As one that was filled afresh with what is left, by ages and ids, also once it goes on.
    oracle = Oracle(capacity, torch.float32)
    oracle.pushed = resized.pushed - kept
    oracle.push(embeddings[pushed - kept :], torch.arange(pushed - kept, pushed))
    if kept:
        assert_agree(resized, oracle, embeddings[-2:], 10)
    more = unit(rng, 7)
    resized.push(more, torch.arange(100, 107))
    oracle.push(more, torch.arange(100, 107))
    assert_agree(resized, oracle, more, 5)


def test_mistakes_are_named(kind: Make) -> None:
    bank, ids = kind(10, DIM), torch.arange(3)
    embeddings = unit(np.random.default_rng(9), 3)
    with pytest.raises(ValueError, match=r"embeddings must be \[\*, 16\], found \[3, 8\]"):
        bank.push(embeddings[:, :8], ids)
    with pytest.raises(ValueError, match=r"ids must be \[3\] int64"):
        bank.push(embeddings, ids[:2])
    with pytest.raises(ValueError, match="ids must be"):
        bank.push(embeddings, ids.float())
    with pytest.raises(ValueError, match="floating point"):
        bank.search(torch.ones(1, DIM, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="k must be at least 1, found 0"):
        bank.search(embeddings, 0)
    with pytest.raises(ValueError, match="on meta, the bank is on cpu"):
        bank.search(embeddings.to("meta"), 1)
    with pytest.raises(ValueError, match="at least 1"):
        kind(0, DIM)
    with pytest.raises(ValueError, match="float"):
        kind(4, DIM, torch.int64)
    bank.push(embeddings, ids)
    state = bank.state_dict()
    with pytest.raises(ValueError, match="holds"):
        kind(10, DIM + 1).load_state_dict(state)
    with pytest.raises(ValueError, match="not the state of a bank"):
        bank.load_state_dict({"queue": embeddings})
    with pytest.raises(ValueError, match="inconsistent"):
        bank.load_state_dict({**state, "ids": torch.arange(2)})
    assert len(bank) == 3
