"""Banks of several ranks against a single bank, bit for bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracle import DIM, unit
from pool import RankPool

from msf_faiss.bank import Bank, FlatBank, IvfBank, ReferenceBank, RingSpec
from msf_faiss.bank.parallel import ReplicatedBank, ShardedBank, load_shards, saved_capacity
from msf_faiss.bank.ring import RingBank
from msf_faiss.bank.scan import SCAN_BANKS
from msf_faiss.distributed.ranks import ALONE, Ranks

LOCAL = {"reference": ReferenceBank, "flat": FlatBank, "bf16": SCAN_BANKS["bf16"]}
PLACEMENTS = ["replicated", "sharded"]


def create(placement: str, create_local: Callable[[RingSpec], RingBank], spec: RingSpec, ranks: Ranks) -> Bank:
    if placement == "replicated":
        return ReplicatedBank(create_local(spec), ranks)
    return ShardedBank(create_local, spec, ranks)


def batches(seed: int, size: int, steps: int, largest: int) -> list[tuple[torch.Tensor, torch.Tensor, list[int]]]:
    """Return embeddings, many of them copies, their ids, and how many each rank pushes, which may be none."""
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
    """Assert that `bank` returns for this rank's part of `queries` what `one` returns for all of them."""
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
    ranks: Ranks, placement: str, kind: str, capacity: int, dtype: torch.dtype, max_age: int | None, known: bool
) -> None:
    spec = RingSpec(capacity, DIM, dtype, max_age=max_age)
    bank, one = create(placement, LOCAL[kind], spec, ranks), ReferenceBank(spec)
    assert_same(bank, one, ranks, unit(np.random.default_rng(1), 2 * ranks.size), [2] * ranks.size, 3)  # empty
    for vectors, ids, counts in batches(capacity, ranks.size, 7, 7):
        mine = part(ranks, counts)
        with ranks.known_row_counts(counts if known else None):
            bank.push(vectors[mine], ids[mine])
            one.push(vectors, ids)
            assert_same(bank, one, ranks, vectors, counts, 5)
            assert_same(bank, one, ranks, unit(np.random.default_rng(2), len(vectors)), counts, 30)
            newest = bank.newest(3)
            own = one.newest(len(one))[max(0, len(one) - len(vectors)) :]  # slots of this push
            lost = len(vectors) - len(own)
            kept = own[max(0, mine.start - lost) : max(0, mine.stop - lost)]
            assert newest.tolist() == kept[max(0, len(kept) - 3) :].tolist()


@pytest.mark.parametrize(
    ("size", "placement", "kind"),
    [
        (2, "replicated", "flat"),
        (2, "sharded", "bf16"),
        (2, "sharded", "reference"),
        (3, "replicated", "bf16"),
        (3, "sharded", "flat"),
        (4, "replicated", "reference"),
        (4, "sharded", "flat"),
    ],
)
def test_ranks_match_single_bank(pool: RankPool, size: int, placement: str, kind: str) -> None:
    """Uneven fills, ranks without rows, duplicates, wrap-around, capacities that the ranks do not divide."""
    for capacity in (size, 29):
        pool.run(size, fill_and_search, placement, kind, capacity, torch.float32, None, True)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_ranks_match_single_bank_in_every_dtype(pool: RankPool, placement: str, dtype: torch.dtype) -> None:
    kind = "reference" if dtype == torch.float64 else "flat"
    pool.run(3, fill_and_search, placement, kind, 31, dtype, None, True)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("max_age", [0, 10, 28])
def test_ranks_respect_max_age(pool: RankPool, placement: str, max_age: int) -> None:
    pool.run(3, fill_and_search, placement, "flat", 29, torch.float32, max_age, True)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_row_counts_need_not_be_known(pool: RankPool, placement: str) -> None:
    pool.run(3, fill_and_search, placement, "flat", 29, torch.float32, None, False)


def push_broken_rows_on_one_rank(ranks: Ranks, placement: str) -> None:
    spec, rng = RingSpec(29, DIM), np.random.default_rng(7)
    bank, one = create(placement, FlatBank, spec, ranks), ReferenceBank(spec)
    vectors, counts = unit(rng, 10), [5, 5]
    broken = vectors.clone()
    broken[7, 3], broken[8] = torch.nan, 2 * vectors[8]
    vectors[7:9] = 0
    mine = part(ranks, counts)
    bank.push(broken[mine], torch.arange(10)[mine])
    one.push(vectors, torch.arange(10))
    assert_same(bank, one, ranks, vectors, counts, 5)
    found = bank.search(broken[mine], 5)
    assert found.similarities.isnan().all(dim=1).tolist() == [row in (7, 8) for row in range(10)][mine]
    assert ranks.sum(torch.tensor(bank.metrics().get("masked_rows", 0.0))) == (4 if placement == "replicated" else 2)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_are_masked_rather_than_refused(pool: RankPool, placement: str) -> None:
    """A rank that raised would leave the others waiting."""
    pool.run(2, push_broken_rows_on_one_rank, placement)


def push_and_save(ranks: Ranks, capacity: int, pushes: int) -> dict[str, torch.Tensor]:
    """Return the state of this rank's shard after some pushes."""
    bank = create("sharded", FlatBank, RingSpec(capacity, DIM), ranks)
    for vectors, ids, counts in batches(3, ranks.size, pushes, 6):
        bank.push(vectors[part(ranks, counts)], ids[part(ranks, counts)])
    return {name: value.clone() for name, value in bank.state_dict().items()}


def load_and_continue(
    ranks: Ranks, placement: str, capacity: int, shards: list[dict[str, torch.Tensor]], of: int
) -> None:
    """Load shards that `of` ranks saved, and compare with a single bank that got the same pushes."""
    spec = RingSpec(capacity, DIM)
    bank, resized = create(placement, FlatBank, spec, ranks), ReferenceBank(spec)
    saved = ReferenceBank(RingSpec(saved_capacity(shards[0]) or len(shards[0]["ids"]), DIM))
    for vectors, ids, _ in batches(3, of, 7, 6):
        saved.push(vectors, ids)
    resized.load_state_dict(saved.state_dict())
    load_shards(bank, len(shards), lambda number: shards[number])
    for vectors, ids, counts in batches(4, ranks.size, 2, 6):
        assert_same(bank, resized, ranks, vectors, counts, 5)
        bank.push(vectors[part(ranks, counts)], ids[part(ranks, counts)])
        resized.push(vectors, ids)
        assert_same(bank, resized, ranks, vectors, counts, 5)


@pytest.mark.parametrize(("before", "capacity"), [(2, 11), (3, 500), (4, 11)])
def test_shards_load_on_any_number_of_ranks(pool: RankPool, before: int, capacity: int) -> None:
    """Full and partly filled; into smaller, equal and larger banks; on as many ranks, fewer and more."""
    shards = pool.run(before, push_and_save, capacity, 7)
    for size in (2, 3, 4):
        for after in sorted({7, capacity, 600}):
            pool.run(size, load_and_continue, "sharded", after, shards, before)
    pool.run(2, load_and_continue, "replicated", capacity, shards, before)
    alone, expected = FlatBank(RingSpec(capacity, DIM)), ReferenceBank(RingSpec(capacity, DIM))
    load_shards(alone, before, lambda number: shards[number])
    for vectors, ids, _ in batches(3, before, 7, 6):
        expected.push(vectors, ids)
    assert_same(alone, expected, ALONE, vectors, [len(vectors)], 5)


@pytest.mark.parametrize("capacity", [11, 40, 500])
def test_whole_bank_loads_on_ranks(pool: RankPool, capacity: int) -> None:
    whole = FlatBank(RingSpec(capacity, DIM))
    for vectors, ids, _ in batches(3, 3, 7, 6):
        whole.push(vectors, ids)
    for placement in PLACEMENTS:
        for after in (7, capacity, 600):
            pool.run(2, load_and_continue, placement, after, [whole.state_dict()], 3)


def test_shards_of_different_banks_raise(pool: RankPool) -> None:
    shards = pool.run(3, push_and_save, 40, 7)
    bank = FlatBank(RingSpec(40, DIM))
    for wrong in (shards[:2], [shards[1], shards[0], shards[2]], [shards[0], shards[0], shards[2]]):
        with pytest.raises(ValueError, match=r"saved shards, with .* entries, are not those of one bank"):
            load_shards(bank, len(wrong), lambda number: wrong[number])  # noqa: B023
    broken = [{**shards[0], "ids": shards[0]["ids"][:-1]}, *shards[1:]]
    with pytest.raises(ValueError, match="inconsistent"):
        load_shards(bank, 3, lambda number: broken[number])
    unnamed = [{name: value for name, value in shards[0].items() if name != "shard.rank"}, *shards[1:]]
    with pytest.raises(ValueError, match="not the state of a shard"):
        load_shards(bank, 3, lambda number: unnamed[number])
    with pytest.raises(ValueError, match="this bank needs"):
        load_shards(FlatBank(RingSpec(40, DIM + 1)), 3, lambda number: shards[number])
    assert len(bank) == 0


def test_fewer_slots_than_ranks_raise() -> None:
    with pytest.raises(ValueError, match="3 entries cannot be sharded over 4 ranks"):
        ShardedBank(FlatBank, RingSpec(3, DIM), Ranks(0, 4))


def check_recall(ranks: Ranks, placement: str) -> tuple[float, float]:
    """Return the recall against a single exact bank and the `exact_ratio`; assert that own entries come first."""
    rng, spec = np.random.default_rng(5), RingSpec(6000, DIM)
    centres = unit(rng, 40, DIM)

    def create_local(spec: RingSpec) -> RingBank:
        return IvfBank(spec, lists=16, probes=6) if placement == "sharded" else SCAN_BANKS["int8"](spec)

    bank, one = create(placement, create_local, spec, ranks), FlatBank(spec)
    recalls = []
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
        recalls.append((found.slots.unsqueeze(2) == exact.slots.unsqueeze(1)).any(dim=2).float().mean())
    with ranks.known_row_counts(None):
        own = bank.newest(7 + ranks.rank)
        assert bank.reconstruct(own).shape == (7 + ranks.rank, DIM)
    assert bank.raise_recall()
    return float(torch.stack(recalls).mean()), bank.metrics().get("exact_ratio", 0.0)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_approximate_banks_on_ranks(pool: RankPool, placement: str) -> None:
    for recall, exact_ratio in pool.run(2, check_recall, placement):
        assert recall > 0.9
        assert exact_ratio < 0.5
