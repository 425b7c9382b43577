"""The recall monitor, on a bank that misses neighbours on demand."""

import pytest
import torch
from torch import Tensor

from msf_faiss.bank import Bank, ReferenceBank, RingSpec
from msf_faiss.bank.recall_monitor import RecallMonitor
from msf_faiss.search.neighbors import Neighbors

DIM = 8


class LossyBank(ReferenceBank):
    """Replaces the neighbours of ranks `lost` by the worst entries, until `raise_recall` is called `enough` times."""

    def __init__(self, capacity: int = 50, *, max_age: int | None = None) -> None:
        super().__init__(RingSpec(capacity, DIM, max_age=max_age))
        self.enough, self.waits_after = 1, 100
        self.lost: list[int] = []
        self.checked: list[tuple[int, ...]] = []
        self.raised = 0

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

    def raise_recall(self) -> str | None:
        if self.raised == self.waits_after:
            return None
        self.raised += 1
        if self.raised >= self.enough:
            self.lost = []
        return f"raised {self.raised} times"


def unit(rows: int, seed: int = 0) -> Tensor:
    vectors = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def step(bank: Bank, rows: int = 6, k: int = 5, seed: int = 0) -> Neighbors:
    """Push and search as a training step does."""
    vectors = unit(rows, seed)
    bank.push(vectors, torch.arange(rows))
    return bank.search(vectors, k)


def filled(capacity: int = 50, entries: int = 50) -> LossyBank:
    bank = LossyBank(capacity)
    bank.push(unit(entries, 99), torch.arange(entries))
    return bank


@pytest.mark.parametrize(("lost", "recall"), [([], 1.0), ([1], 3 / 4), ([2, 4], 2 / 4), ([1, 2, 3, 4], 0.0)])
def test_recall_excludes_own_entry(lost: list[int], recall: float) -> None:
    """One of five neighbours is the query's own entry, so each of the others counts a quarter."""
    bank, monitor = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0)
    bank.lost = lost
    assert monitor.recall is None
    assert monitor.check(bank, step(bank), 1) is None
    assert monitor.recall == recall
    assert bank.checked == [(6, DIM, 5)]


def test_missed_own_entry_does_not_count() -> None:
    bank, monitor = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0)
    bank.lost = [0]
    monitor.check(bank, step(bank), 1)
    assert monitor.recall == 1.0


@pytest.mark.parametrize(("capacity", "entries"), [(50, 48), (50, 50), (7, 30), (6, 6), (5, 9), (3, 9)])
def test_newest_queries_are_checked_across_the_end_of_the_ring(capacity: int, entries: int) -> None:
    """Also if the bank is smaller than the batch, so that some queries have no entry."""
    bank, monitor = filled(capacity, entries), RecallMonitor(every_steps=1, queries=100, min_recall=1)
    found = step(bank)
    assert monitor.check(bank, found, 1) is None
    assert monitor.recall == 1.0
    assert bank.checked == [(min(6, capacity), DIM, min(5, capacity))]


def test_queries_with_own_entry_beyond_max_age_are_checked() -> None:
    bank, monitor = LossyBank(max_age=3), RecallMonitor(every_steps=1, queries=6, min_recall=0)
    bank.lost = [1]
    monitor.check(bank, step(bank, k=2), 1)
    # The queries of the four young entries miss their only other neighbour, the older two miss one of two.
    assert monitor.recall == 2 / (4 * 1 + 2 * 2)


def test_last_queries_are_checked() -> None:
    bank, monitor = filled(), RecallMonitor(every_steps=1, queries=2, min_recall=0)
    found = step(bank)
    found.slots[:-2] = found.slots[:1, :1]  # wrong for all queries but the last two
    monitor.check(bank, found, 1)
    assert monitor.recall == 1.0
    assert bank.checked == [(2, DIM, 5)]
    monitor.check(bank, step(bank, rows=1), 2)  # fewer queries than `queries`
    assert bank.checked[1:] == [(1, DIM, 5)]


def test_no_recall_without_other_neighbors() -> None:
    """With k = 1, a bank of one entry, or a max_age of 0."""
    for bank, k in ((filled(), 1), (LossyBank(1), 5), (LossyBank(max_age=0), 5)):
        monitor = RecallMonitor(every_steps=1, queries=6, min_recall=1)
        found = step(bank, rows=1, k=k) if k == 5 else step(bank, k=k)
        assert monitor.check(bank, found, 1) is None
        assert monitor.recall is None
        assert bank.raised == 0


def test_any_of_tied_neighbors_is_correct() -> None:
    """With a collapsed encoder, the exact search may return any of the identical entries."""
    bank, monitor = LossyBank(), RecallMonitor(every_steps=1, queries=6, min_recall=1)
    bank.push(unit(1).expand(50, -1), torch.arange(50))
    found = bank.search(unit(1).expand(6, -1), 5)
    found.slots[:, 1:] -= 20
    assert monitor.check(bank, found, 1) is None
    assert monitor.recall == 1


def test_checks_every_steps() -> None:
    bank, monitor = filled(), RecallMonitor(every_steps=3, queries=6, min_recall=0)
    for number in range(1, 10):
        monitor.check(bank, step(bank, seed=number), number)
        assert len(bank.checked) == number // 3
        assert (monitor.recall is None) == (number < 3)


def test_older_checks_count_half() -> None:
    bank, monitor = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0)
    for number, (lost, recall) in enumerate(
        [([1, 2, 3, 4], 0), ([], 2 / 3), ([1, 2], (0.25 * 0 + 0.5 * 1 + 0.5) / 1.75)], start=1
    ):
        bank.lost = lost
        monitor.check(bank, step(bank, seed=number), number)
        assert monitor.recall == pytest.approx(recall)


def test_recall_below_min_recall_is_raised_and_counts_restart() -> None:
    bank, monitor = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0.9)
    assert monitor.check(bank, step(bank, seed=1), 1) is None
    bank.lost = [3]
    assert monitor.check(bank, step(bank, seed=2), 2) == "recall 0.833 is below 0.9: raised 1 times"
    assert monitor.recall is None
    assert monitor.state_dict()["counts"].tolist() == [0, 0]
    assert monitor.check(bank, step(bank, seed=3), 3) is None
    assert (monitor.recall, bank.raised) == (1.0, 1)
    bank.lost = [1, 2, 3, 4]
    assert monitor.check(bank, step(bank, seed=4), 4) == "recall 0.333 is below 0.9: raised 2 times"


@pytest.mark.parametrize("needed", [1, 4, 7])
def test_recall_is_raised_until_it_is_enough(needed: int) -> None:
    """In the same check, which searches the queries exactly only once."""
    bank, monitor = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0.9)
    bank.lost, bank.enough = [1, 2], needed
    assert monitor.check(bank, step(bank), 1) == f"recall 0.500 is below 0.9: raised {needed} times"
    assert bank.raised == needed
    assert len(bank.checked) == 1


@pytest.mark.parametrize("raises", [0, 2])
def test_bank_that_waits_for_a_better_index_is_asked_again_in_the_next_check(raises: int) -> None:
    bank, monitor = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0.9)
    bank.lost, bank.enough, bank.waits_after = [1, 2], 3, raises
    change = monitor.check(bank, step(bank), 1)
    assert change == (f"recall 0.500 is below 0.9: raised {raises} times" if raises else None)
    bank.waits_after = 100
    assert monitor.check(bank, step(bank), 2) == "recall 0.500 is below 0.9: raised 3 times"


def test_bank_that_cannot_raise_its_recall_does_not_stop_the_check() -> None:
    bank, monitor = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0.9)
    bank.lost, bank.enough = [1, 2], 10**9
    assert "recall 0.500 is below 0.9: raised" in (monitor.check(bank, step(bank), 1) or "")


def test_recall_equal_to_min_recall_is_enough() -> None:
    bank, monitor = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0.75)
    bank.lost = [2]
    assert monitor.check(bank, step(bank), 1) is None
    assert (monitor.recall, bank.raised) == (0.75, 0)


def test_state_dict_round_trip() -> None:
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


def test_check_does_not_change_the_bank() -> None:
    bank, monitor = filled(), RecallMonitor(every_steps=1, queries=6, min_recall=0)
    found = step(bank)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    slots = found.slots.clone()
    monitor.check(bank, found, 1)
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())
    assert torch.equal(found.slots, slots)
