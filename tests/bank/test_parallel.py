"""Banks of several ranks against one bank, bit for bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracle import DIM, unit
from pool import RankPool

from msf_faiss.bank import (
    Bank,
    FlatBank,
    IvfBank,
    ReferenceBank,
    ReplicatedBank,
    ShardedBank,
    shard_capacity,
)
from msf_faiss.bank.parallel import load_shards
from msf_faiss.bank.scan.bf16 import Bf16ScanBank
from msf_faiss.bank.scan.int8 import Int8ScanBank
from msf_faiss.distributed.ranks import Ranks

LOCAL: dict[str, Callable[..., Bank]] = {"reference": ReferenceBank, "flat": FlatBank, "bf16": Bf16ScanBank}
PLACEMENTS = ["replicated", "sharded"]


def create(
    placement: str,
    kind: Callable[..., Bank],
    capacity: int,
    ranks: Ranks,
    dtype: torch.dtype = torch.float32,
    max_age: int | None = None,
) -> Bank:
    if placement == "replicated":
        return ReplicatedBank(kind(capacity, DIM, dtype, max_age=max_age), ranks)
    return ShardedBank(kind(shard_capacity(capacity, ranks), DIM, dtype), capacity, ranks, max_age=max_age)


def batches(seed: int, size: int, steps: int, largest: int) -> list[tuple[torch.Tensor, torch.Tensor, list[int]]]:
    """Embeddings, ids and how many of them each rank brings: none sometimes, and many of them the same."""
    rng, made, first = np.random.default_rng(seed), [], 0
    twins = unit(rng, 3)
    for step in range(steps):
        counts = rng.integers(0, largest + 1, size).tolist()
        if step % 3 == 1:
            counts = [largest] * size
        vectors = unit(rng, sum(counts))
        for row in range(len(vectors)):
            if rng.random() < 0.4:
                vectors[row] = twins[rng.integers(3)]
        made.append((vectors, torch.arange(first, first + len(vectors)), counts))
        first += len(vectors)
    return made


def part(ranks: Ranks, counts: list[int]) -> slice:
    start = sum(counts[: ranks.rank])
    return slice(start, start + counts[ranks.rank])


def assert_same(bank: Bank, one: Bank, ranks: Ranks, queries: torch.Tensor, counts: list[int], k: int) -> None:
    """What this rank is told about its part of `queries` is what one bank says of all of them."""
    mine = part(ranks, counts)
    assert (len(bank), bank.pushed, bank.capacity) == (len(one), one.pushed, one.capacity)
    found, expected = bank.search(queries[mine], k), one.search(queries, k)
    assert torch.equal(found.slots, expected.slots[mine])
    assert torch.equal(found.similarities, expected.similarities[mine])
    assert torch.equal(bank.ids(found.slots), one.ids(found.slots))
    assert torch.equal(bank.age(found.slots), one.age(found.slots))
    assert torch.equal(bank.reconstruct(found.slots), one.reconstruct(found.slots))
    if found.slots.shape[1]:
        # The terms are added in another order: float32 sums of a few numbers below 1.
        mean = one.mean_of(expected.slots)[mine]
        torch.testing.assert_close(bank.mean_of(found.slots), mean, rtol=0, atol=1e-6)


def fill_and_search(
    ranks: Ranks, placement: str, kind: str, capacity: int, dtype: torch.dtype, max_age: int | None, agreed: bool
) -> None:
    bank = create(placement, LOCAL[kind], capacity, ranks, dtype, max_age)
    one = ReferenceBank(capacity, DIM, dtype, max_age=max_age)
    assert_same(bank, one, ranks, unit(np.random.default_rng(1), 2 * ranks.size), [2] * ranks.size, 3)  # empty
    for vectors, ids, counts in batches(capacity, ranks.size, 7, 7):
        mine = part(ranks, counts)
        with ranks.known_row_counts(counts if agreed else None):
            bank.push(vectors[mine], ids[mine])
            one.push(vectors, ids)
            assert_same(bank, one, ranks, vectors, counts, 5)
            assert_same(bank, one, ranks, unit(np.random.default_rng(2), len(vectors)), counts, 30)
            newest = bank.newest(3)
            own = one.newest(len(one))[max(0, len(one) - len(vectors)) :]  # of this push, as far as it is still there
            lost = len(vectors) - len(own)
            kept = own[max(0, mine.start - lost) : max(0, mine.stop - lost)]
            assert newest.tolist() == kept[max(0, len(kept) - 3) :].tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", LOCAL)
def test_ranks_find_what_one_bank_finds(pool: RankPool, size: int, placement: str, kind: str) -> None:
    """Uneven fills, ranks without rows, duplicates, wrap-around, capacities that the ranks do not divide."""
    for capacity in (size, 29):
        pool.run(size, fill_and_search, placement, kind, capacity, torch.float32, None, True)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_in_every_dtype(pool: RankPool, placement: str, dtype: torch.dtype) -> None:
    kind = "reference" if dtype == torch.float64 else "flat"
    pool.run(3, fill_and_search, placement, kind, 31, dtype, None, True)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("max_age", [0, 10, 28])
def test_what_is_too_old_is_never_found(pool: RankPool, placement: str, max_age: int) -> None:
    pool.run(3, fill_and_search, placement, "flat", 29, torch.float32, max_age, True)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_numbers_of_rows_need_not_be_agreed(pool: RankPool, placement: str) -> None:
    pool.run(3, fill_and_search, placement, "flat", 29, torch.float32, None, False)


def save_and_resume(ranks: Ranks, capacity: int, pushes: int) -> list[dict[str, torch.Tensor]]:
    """The shards of a bank that was given some pushes, of which this rank returns its own."""
    bank = create("sharded", FlatBank, capacity, ranks)
    for vectors, ids, counts in batches(3, ranks.size, pushes, 6):
        bank.push(vectors[part(ranks, counts)], ids[part(ranks, counts)])
    return {name: value.clone() for name, value in bank.state_dict().items()}


def go_on(ranks: Ranks, placement: str, capacity: int, shards: list[dict[str, torch.Tensor]], of: int) -> None:
    """Take over shards, and do as one bank does that was filled by as many ranks."""
    bank, resized = create(placement, FlatBank, capacity, ranks), ReferenceBank(capacity, DIM)
    saved_capacity = int(shards[0]["shard.capacity"]) if "shard.capacity" in shards[0] else len(shards[0]["ids"])
    saved = ReferenceBank(saved_capacity, DIM)
    for vectors, ids, _ in batches(3, of, 7, 6):
        saved.push(vectors, ids)
    resized.load_state_dict(saved.state_dict())
    target = bank.local if isinstance(bank, ReplicatedBank) else bank
    load_shards(target, len(shards), lambda number: shards[number])
    for vectors, ids, counts in batches(4, ranks.size, 2, 6):
        assert_same(bank, resized, ranks, vectors, counts, 5)
        bank.push(vectors[part(ranks, counts)], ids[part(ranks, counts)])
        resized.push(vectors, ids)
        assert_same(bank, resized, ranks, vectors, counts, 5)


@pytest.mark.parametrize("before", [2, 3, 4])
@pytest.mark.parametrize("capacity", [11, 500])
def test_shards_are_dealt_to_any_number_of_ranks(pool: RankPool, before: int, capacity: int) -> None:
    """Full and partly filled; into smaller, equal and larger banks; by as many ranks, fewer and more."""
    shards = pool.run(before, save_and_resume, capacity, 7)
    for size in (2, 3, 4):
        for after in sorted({7, capacity, 600}):
            pool.run(size, go_on, "sharded", after, shards, before)
    pool.run(2, go_on, "replicated", capacity, shards, before)
    alone = FlatBank(capacity, DIM)
    load_shards(alone, before, lambda number: shards[number])
    expected = ReferenceBank(capacity, DIM)
    for vectors, ids, _ in batches(3, before, 7, 6):
        expected.push(vectors, ids)
    assert_same(alone, expected, Ranks.alone(), vectors, [len(vectors)], 5)


@pytest.mark.parametrize("capacity", [11, 40, 500])
def test_a_whole_bank_is_dealt_to_ranks(pool: RankPool, capacity: int) -> None:
    whole = FlatBank(capacity, DIM)
    for vectors, ids, _ in batches(3, 3, 7, 6):
        whole.push(vectors, ids)
    for placement in PLACEMENTS:
        for after in (7, capacity, 600):
            pool.run(2, go_on, placement, after, [whole.state_dict()], 3)


def test_shards_that_do_not_belong_together_are_refused(pool: RankPool) -> None:
    shards = pool.run(3, save_and_resume, 40, 7)
    bank = FlatBank(40, DIM)
    for wrong in (shards[:2], [shards[1], shards[0], shards[2]], [shards[0], shards[0], shards[2]]):
        with pytest.raises(ValueError, match=r"saved shards, which hold .* are not those of one bank"):
            load_shards(bank, len(wrong), lambda number: wrong[number])  # noqa: B023
    broken = [{**shards[0], "ids": shards[0]["ids"][:-1]}, *shards[1:]]
    with pytest.raises(ValueError, match="inconsistent"):
        load_shards(bank, 3, lambda number: broken[number])
    unnamed = [{name: value for name, value in shards[0].items() if name != "shard.rank"}, *shards[1:]]
    with pytest.raises(ValueError, match="not the state of a shard"):
        load_shards(bank, 3, lambda number: unnamed[number])
    with pytest.raises(ValueError, match="holds"):
        load_shards(FlatBank(40, DIM + 1), 3, lambda number: shards[number])
    assert len(bank) == 0


def test_fewer_slots_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 entries cannot be sharded over 4 ranks"):
        shard_capacity(3, Ranks(0, 4))


def check_recall(ranks: Ranks, placement: str) -> tuple[float, float]:
    """An index over ranks: the own entry first, and recall against one exact bank."""
    rng = np.random.default_rng(5)
    centres = unit(rng, 40, DIM)

    def kind(capacity: int, dim: int, dtype: torch.dtype, max_age: int | None = None) -> Bank:
        if placement == "sharded":
            return IvfBank(capacity, dim, dtype, lists=16, probes=6, max_age=max_age)
        return Int8ScanBank(capacity, dim, dtype, max_age=max_age)

    bank, one = create(placement, kind, 6000, ranks), FlatBank(6000, DIM)
    found_shares, exact_ratios = [], []
    for step in range(50):
        noise = unit(rng, 128 * ranks.size)
        vectors = torch.nn.functional.normalize(centres[rng.integers(0, 40, len(noise))] + 0.4 * noise, dim=1)
        counts, ids = [128] * ranks.size, torch.arange(len(vectors))
        mine = part(ranks, counts)
        with ranks.known_row_counts(counts):
            bank.push(vectors[mine], ids[mine])
            one.push(vectors, ids)
            if step < 40:
                continue
            found, exact = bank.search(vectors[mine], 5), one.search(vectors[mine], 5)
            assert torch.equal(bank.age(found.slots)[:, 0], one.age(exact.slots)[:, 0])
            again = bank.search_exactly(vectors[mine], 5)
        assert torch.equal(again.slots, exact.slots)
        found_shares.append(
            torch.isin(
                found.slots + 10_000 * torch.arange(128).unsqueeze(1),
                exact.slots + 10_000 * torch.arange(128).unsqueeze(1),
            )
            .float()
            .mean()
        )
        exact_ratios.append(1.0)
    with ranks.known_row_counts(None):
        own = bank.newest(7 + ranks.rank)
        assert bank.reconstruct(own).shape == (7 + ranks.rank, DIM)
    assert bank.raise_recall()
    return float(torch.stack(found_shares).mean()), bank.metrics().get("exact_ratio", 0.0)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_indexes_work_in_ranks(pool: RankPool, placement: str) -> None:
    for recall, exact_ratio in pool.run(2, check_recall, placement):
        assert recall > 0.9  # .97 and above; the point is that shards are merged, not which lists are probed
        assert exact_ratio < 0.5
