"""Every kind of bank against the oracle: random sequences of pushes, searches, saves and changes of capacity."""

import numpy as np
import pytest
import torch
from banks import ON_CPU, BankKind, count_indexed_queries
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from oracle import Oracle, assert_agree, unit
from torch import Tensor

from msf_faiss.bank import Bank

DIM = 8
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The examples depend neither on earlier failures nor on the speed of the machine.
few = settings(database=None, deadline=None, max_examples=25)
many = settings(few, max_examples=100)

capacities = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)
# Sizes relative to the capacity, which may change.
pushes = st.tuples(st.just("push"), st.floats(0, 0.3) | st.floats(0, 3), seeds)
searches = st.tuples(st.just("search"), st.floats(0, 1), seeds)
saves = st.tuples(st.just("save"), st.just(0), st.just(0))
resizes = st.tuples(st.just("resize"), capacities, st.just(0))
operations = st.lists(st.one_of(pushes, pushes, searches, searches, saves, resizes), min_size=1, max_size=12)


def drawn(rows: int, number: int, pool: Tensor) -> Tensor:
    """Return vectors [rows, D], some or most of them from a small pool, so that they recur."""
    rng = np.random.default_rng(number)
    fresh, known = unit(rng, rows, DIM), pool[torch.from_numpy(rng.integers(0, len(pool), rows))]
    return torch.where(torch.from_numpy(rng.random((rows, 1)) < rng.random()), known, fresh)


def saved(bank: object) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in bank.state_dict().items()}


def assert_newest_come_first(bank: Bank, oracle: Oracle, embeddings: Tensor) -> None:
    """Assert that the first neighbour of each vector of the last push is its youngest copy."""
    found = bank.search(embeddings, 3)
    for row in range(len(embeddings) - min(len(embeddings), oracle.searchable, 4), len(embeddings)):
        [(similarity, slot, _, _)] = oracle.search(embeddings[row], 1)
        assert (found.similarities[row, 0], found.slots[row, 0]) == (similarity, slot)


def run_operations(
    kind: BankKind, capacity: int, dtype: torch.dtype, max_age: int | None, steps: list[tuple[str, float, int]]
) -> None:
    pool = unit(np.random.default_rng(0), 3, DIM)
    bank, oracle = kind(capacity, DIM, dtype, max_age=max_age), Oracle(capacity, dtype, max_age)
    next_id = 0
    for what, size, number in [*steps, ("search", 1.0, 0)]:
        match what:
            case "push":
                embeddings = drawn(round(size * bank.capacity), number, pool)
                ids = torch.arange(next_id, next_id + len(embeddings))
                next_id += len(embeddings)
                bank.push(embeddings, ids)
                oracle.push(embeddings, ids)
                assert_newest_come_first(bank, oracle, embeddings)
            case "search":
                k = 1 + round(size * (bank.capacity + 2))
                assert_agree(bank, oracle, drawn(4, number, pool), k, exact=kind.exact)
            case "save":
                again = kind(bank.capacity, DIM, dtype, max_age=max_age)
                again.load_state_dict(saved(bank))
                queries = drawn(4, 1, pool)
                for before, after in zip(bank.search(queries, 3), again.search(queries, 3), strict=True):
                    assert torch.equal(before, after)
                bank = again
            case "resize":
                again = kind(int(size), DIM, dtype, max_age=max_age)
                again.load_state_dict(saved(bank))
                bank, oracle = again, oracle.resized(again.capacity, again.pushed)
                assert bank.pushed >= len(bank)


@pytest.mark.parametrize("kind", ON_CPU, ids=str)
def test_bank_agrees_with_oracle_after_any_operations(kind: BankKind) -> None:
    @seed(1)
    @(many if kind.indexed else few)  # not all examples use the index
    @given(capacity=capacities, dtype=st.sampled_from(DTYPES), max_age=st.none() | st.integers(0, 50), steps=operations)
    def each(capacity: int, dtype: torch.dtype, max_age: int | None, steps: list[tuple[str, float, int]]) -> None:
        run_operations(kind, capacity, dtype, max_age, steps)

    with count_indexed_queries() as counts:
        each()
    assert not kind.indexed or sum(counts) > 100
