"""A bank that misses neighbours is noticed, told, and counted anew."""

import pytest
import torch
from torch import Tensor

from msf_faiss.bank import ApproximateBank, ReferenceBank
from msf_faiss.bank.recall_monitor import RecallMonitor
from msf_faiss.bank.ring import RingBank
from msf_faiss.search.neighbors import Neighbors

DIM = 8


class Forgetful(ReferenceBank):
    """Replaces each query's neighbour number `lost` by the worst entry, until it is told to improve."""

    def __init__(self, capacity: int = 50, *, max_age: int | None = None) -> None:
        super().__init__(capacity, DIM, max_age=max_age)
        self.lost: list[int] = []
        self.checked: list[tuple[int, ...]] = []
        self.improved = 0

    def search_exactly(self, queries: Tensor, k: int) -> Neighbors:
        self.checked.append((*queries.shape, k))
        return super()._search(queries.to(self.dtype), min(k, self.searchable))

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        found = super()._search(queries, k)
        if self.lost:
            worst = super()._search(queries, self.searchable)
            for nth, rank in enumerate(self.lost, start=1):
                found.slots[:, rank], found.similarities[:, rank] = worst.slots[:, -nth], worst.similarities[:, -nth]
        return found

    def raise_recall(self) -> str:
        self.improved += 1
        self.lost = []
        return f"improved {self.improved} times"


def unit(rows: int, seed: int = 0) -> Tensor:
    vectors = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def step(bank: RingBank, rows: int = 6, k: int = 5, seed: int = 0) -> Neighbors:
    """What a training step does with a bank."""
    vectors = unit(rows, seed)
    bank.push(vectors, torch.arange(rows))
    return bank.search(vectors, k)


def filled(capacity: int = 50, entries: int = 50) -> Forgetful:
    bank = Forgetful(capacity)
    bank.push(unit(entries, 99), torch.arange(entries))
    return bank


def test_the_fake_is_an_approximate_bank() -> None:
    assert isinstance(Forgetful(), ApproximateBank)
    assert not isinstance(ReferenceBank(4, DIM), ApproximateBank)


@pytest.mark.parametrize(("lost", "recall"), [([], 1.0), ([1], 3 / 4), ([2, 4], 2 / 4), ([1, 2, 3, 4], 0.0)])
def test_recall_leaves_out_the_own_entry(lost: list[int], recall: float) -> None:
    """Of five neighbours one is the query's own entry: four are to be found, and one lost is a quarter."""
    bank, watch = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0)
    bank.lost = lost
    assert watch.recall is None
    assert watch.check(bank, step(bank), 1) is None
    assert watch.recall == recall
    assert bank.checked == [(6, DIM, 5)]


def test_an_own_entry_that_was_lost_does_not_count() -> None:
    bank, watch = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0)
    bank.lost = [0]
    watch.check(bank, step(bank), 1)
    assert watch.recall == 1.0


@pytest.mark.parametrize(("capacity", "entries"), [(50, 48), (50, 50), (7, 30), (6, 6), (5, 9), (3, 9)])
def test_the_newest_queries_are_checked_also_across_the_end_of_the_ring(capacity: int, entries: int) -> None:
    """Also where the bank is smaller than the batch, so that some of the queries have no entry any more."""
    bank, watch = filled(capacity, entries), RecallMonitor(every_steps=1, queries=100, min_recall=1)
    found = step(bank)
    assert watch.check(bank, found, 1) is None
    assert watch.recall == 1.0
    assert bank.checked == [(min(6, capacity), DIM, min(5, capacity))]


def test_queries_whose_own_entry_is_too_old_to_be_found_are_checked_too() -> None:
    bank, watch = Forgetful(max_age=3), RecallMonitor(every_steps=1, queries=6, min_recall=0)
    bank.lost = [1]
    watch.check(bank, step(bank, k=2), 1)
    # Four entries are young enough. Their queries miss the only other one, the older two queries one of two.
    assert watch.recall == 2 / (4 * 1 + 2 * 2)


def test_only_so_many_queries_are_checked_and_they_are_the_last_ones() -> None:
    bank, watch = filled(), RecallMonitor(every_steps=1, queries=2, min_recall=0)
    found = step(bank)
    found.slots[:-2] = found.slots[:1, :1]  # nonsense for all queries but the last two
    watch.check(bank, found, 1)
    assert watch.recall == 1.0
    assert bank.checked == [(2, DIM, 5)]
    watch.check(bank, step(bank, rows=1), 2)  # fewer queries than asked for
    assert bank.checked[1:] == [(1, DIM, 5)]


def test_a_bank_that_can_find_nothing_but_the_own_entry_has_no_recall() -> None:
    """k = 1, a bank of one entry, or a max_age of 0: there is nothing to miss, and nothing to promise."""
    for bank, k in ((filled(), 1), (Forgetful(1), 5), (Forgetful(max_age=0), 5)):
        watch = RecallMonitor(every_steps=1, queries=6, min_recall=1)
        found = step(bank, rows=1, k=k) if k == 5 else step(bank, k=k)
        assert watch.check(bank, found, 1) is None
        assert watch.recall is None
        assert bank.improved == 0


def test_any_of_many_equals_is_as_right_as_the_others() -> None:
    """In a collapsed encoder, which of the equals an exact search names is a matter of chance."""
    bank, watch = Forgetful(), RecallMonitor(every_steps=1, queries=6, min_recall=1)
    bank.push(unit(1).expand(50, -1), torch.arange(50))
    found = bank.search(unit(1).expand(6, -1), 5)
    found.slots[:, 1:] -= 20
    assert watch.check(bank, found, 1) is None
    assert watch.recall == 1


def test_it_is_checked_every_so_many_steps() -> None:
    bank, watch = filled(), RecallMonitor(every_steps=3, queries=6, min_recall=0)
    for number in range(1, 10):
        watch.check(bank, step(bank, seed=number), number)
        assert len(bank.checked) == number // 3
        assert (watch.recall is None) == (number < 3)


def test_an_older_check_counts_half() -> None:
    bank, watch = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0)
    for number, (lost, recall) in enumerate(
        [([1, 2, 3, 4], 0), ([], 2 / 3), ([1, 2], (0.25 * 0 + 0.5 * 1 + 0.5) / 1.75)], start=1
    ):
        bank.lost = lost
        watch.check(bank, step(bank, seed=number), number)
        assert watch.recall == pytest.approx(recall)


def test_below_what_was_promised_the_bank_improves_and_is_counted_anew() -> None:
    bank, watch = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0.9)
    assert watch.check(bank, step(bank, seed=1), 1) is None
    bank.lost = [3]
    assert watch.check(bank, step(bank, seed=2), 2) == "recall 0.833 is below 0.9: improved 1 times"
    assert watch.recall is None  # what was counted is about the bank as it was
    assert watch.state_dict()["counts"].tolist() == [0, 0]
    assert watch.check(bank, step(bank, seed=3), 3) is None
    assert (watch.recall, bank.improved) == (1.0, 1)
    bank.lost = [1, 2, 3, 4]
    assert watch.check(bank, step(bank, seed=4), 4) == "recall 0.333 is below 0.9: improved 2 times"


def test_just_what_was_promised_is_enough() -> None:
    bank, watch = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0.75)
    bank.lost = [2]
    assert watch.check(bank, step(bank), 1) is None
    assert (watch.recall, bank.improved) == (0.75, 0)


def test_a_resumed_watch_goes_on_bit_for_bit() -> None:
    whole, first, second = (RecallMonitor(every_steps=1, queries=6, min_recall=0) for _ in range(3))
    bank, other = filled(), filled()
    for number in range(1, 12):
        bank.lost = other.lost = [1] if number % 3 else []
        found, same = step(bank, seed=number), step(other, seed=number)
        whole.check(bank, found, number)
        if number == 7:
            second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
        (first if number < 7 else second).check(other, same, number)
        if number >= 7:
            assert second.recall == whole.recall
            assert torch.equal(second.state_dict()["counts"], whole.state_dict()["counts"])
    assert whole.state_dict()["counts"].dtype == torch.float64
    assert whole.state_dict()["counts"].shape == (2,)


def test_a_check_changes_nothing_in_the_bank() -> None:
    bank, watch = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0)
    found = step(bank)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    slots = found.slots.clone()
    watch.check(bank, found, 1)
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())
    assert torch.equal(found.slots, slots)
