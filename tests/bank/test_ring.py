"""The ring: which slots are live, what an index is told of writes, and loading a state into another ring."""

import pytest
import torch
from torch import Tensor

from msf_faiss.bank.ring import RingBank, RingSpec
from msf_faiss.search.neighbors import Neighbors


class IndexedRing(RingBank):
    """Records the writes that an index would follow. Entry number i is the unit vector at an angle of i / 100."""

    def __init__(self, capacity: int, dtype: torch.dtype = torch.float32, max_age: int | None = None) -> None:
        super().__init__(RingSpec(capacity, 2, dtype, max_age=max_age))
        self.written: list[tuple[int, int, list[int], int]] = []
        self.loaded: dict[str, Tensor] | None = None

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        raise NotImplementedError

    def _written(self, start: int, stop: int) -> None:
        self.written.append((start, stop, numbers(self._entries[start:stop]), self.pushed))

    def _index_state(self) -> dict[str, Tensor]:
        return {"codes": torch.tensor([1, 2, 3])}

    def _load_index(self, state: dict[str, Tensor]) -> None:
        self.loaded = state

    @property
    def live(self) -> list[int]:
        return [slot for start, stop in self._live_slots() for slot in range(start, stop)]


def fill(bank: RingBank, count: int, first: int = 0) -> None:
    """Push `count` entries, number i with id 100 + i."""
    new = torch.arange(first, first + count)
    bank.push(torch.stack([(new / 100).cos(), (new / 100).sin()], dim=1), 100 + new)


def numbers(entries: Tensor) -> list[int]:
    """Return the numbers of entries [n, 2]."""
    found: list[int] = (100 * torch.atan2(entries[:, 1], entries[:, 0])).round().int().tolist()
    return found


@pytest.mark.parametrize("max_age", [None, 0, 1, 2, 3, 4, 5, 6, 50])
@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_live_slots_have_the_youngest_entries(capacity: int, max_age: int | None) -> None:
    bank = IndexedRing(capacity, max_age=max_age)
    assert bank.live == []
    for pushed in range(1, 3 * capacity + 2):
        fill(bank, 1, pushed - 1)
        young = range(max(0, pushed - capacity, 0 if max_age is None else pushed - 1 - max_age), pushed)
        assert bank.searchable == len(young)
        assert bank.live == sorted(number % capacity for number in young)
        ranges = bank._live_slots()
        assert len(ranges) <= (2 if len(young) < capacity else 1)
        assert all(start < stop for start, stop in ranges)
        assert bank.age(torch.tensor(bank.live)).max() == len(young) - 1


def test_each_written_range_is_reported_to_the_index() -> None:
    bank = IndexedRing(5)
    fill(bank, 3)
    fill(bank, 4, 3)
    fill(bank, 12, 7)  # only the last five are stored
    fill(bank, 0, 19)
    assert bank.written == [
        (0, 3, [0, 1, 2], 3),
        (3, 5, [3, 4], 7),
        (0, 2, [5, 6], 7),
        (4, 5, [14], 19),
        (0, 4, [15, 16, 17, 18], 19),
    ]


@pytest.mark.parametrize("pushed", [0, 3, 5, 12])
def test_state_dict_shares_memory_with_ring(pushed: int) -> None:
    bank = IndexedRing(5)
    fill(bank, pushed)
    state = bank.state_dict()
    assert state.keys() == {"embeddings", "ids", "pushed", "index.codes"}
    assert state["embeddings"].shape == (min(pushed, 5), 2)
    assert state["ids"].shape == (min(pushed, 5),)
    assert state["embeddings"].data_ptr() == bank._entries.data_ptr() or pushed == 0


@pytest.mark.parametrize("pushed", [0, 1, 4, 5, 6, 12, 20])
@pytest.mark.parametrize("capacity", [1, 3, 5, 7, 20])
def test_load_keeps_newest_entries_in_their_own_slots(capacity: int, pushed: int) -> None:
    saved, bank = IndexedRing(5), IndexedRing(capacity)
    fill(saved, pushed)
    fill(bank, 2, 50)  # must be overwritten
    bank.load_state_dict(saved.state_dict())
    kept = min(pushed, 5, capacity)
    newest = torch.arange(kept)  # ages
    slots = (bank.pushed - 1 - newest) % capacity
    assert bank.age(slots).tolist() == newest.tolist()
    assert numbers(bank.reconstruct(slots)) == list(range(pushed - 1, pushed - 1 - kept, -1))
    assert bank.ids(slots).tolist() == list(range(100 + pushed - 1, 100 + pushed - 1 - kept, -1))
    assert len(bank) == kept
    assert bank.live == sorted(slots.tolist())
    assert int(bank._entries.any(dim=1).sum()) == kept  # the rest of the ring is empty
    # The count continues, except for a full ring loaded into a larger one, whose new slots are empty.
    assert bank.pushed == (kept if pushed > 5 and capacity > 5 else pushed)


def test_saved_index_is_loaded_only_into_an_equal_ring() -> None:
    saved = IndexedRing(5)
    fill(saved, 12)
    same, smaller, larger, half = IndexedRing(5), IndexedRing(4), IndexedRing(6), IndexedRing(5, torch.float16)
    for bank in (same, smaller, larger, half):
        bank.load_state_dict(saved.state_dict())
    assert same.loaded is not None
    assert same.loaded["codes"].tolist() == [1, 2, 3]
    assert (smaller.loaded, larger.loaded, half.loaded) == ({}, {}, {})
    # A partly filled ring has the same slots in a larger one.
    partly, roomy = IndexedRing(5), IndexedRing(6)
    fill(partly, 3)
    roomy.load_state_dict(partly.state_dict())
    assert roomy.loaded is not None
    assert roomy.loaded.keys() == {"codes"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.arange(2)}, "inconsistent: 3 entries, [2] ids of torch.int64, 3 pushed"),
        ({"ids": torch.zeros(3)}, "inconsistent: 3 entries, [3] ids of torch.float32, 3 pushed"),
        ({"pushed": torch.tensor(2)}, "inconsistent: 3 entries, [3] ids of torch.int64, 2 pushed"),
        ({"pushed": torch.tensor(-1)}, "inconsistent: 3 entries, [3] ids of torch.int64, -1 pushed"),
        (
            {"embeddings": torch.zeros(0, 2), "ids": torch.arange(0)},
            "inconsistent: 0 entries, [0] ids of torch.int64, 3 pushed",
        ),
        ({"embeddings": torch.zeros(3)}, "entries [3] torch.float32, this bank needs [n, 2]"),
        ({"embeddings": torch.zeros(3, 1)}, "entries [3, 1] torch.float32, this bank needs [n, 2]"),
        ({"embeddings": torch.ones(3, 2, dtype=torch.int8)}, "entries [3, 2] torch.int8, this bank needs [n, 2]"),
        (
            {"embeddings": torch.ones(3, 2)},
            "must be finite and have unit norm, but row 0 has norm 1.414 (3 such of 3 rows)",
        ),
        ({"embeddings": torch.full((3, 2), torch.nan)}, "row 0 is not finite"),
        ({"ids": [1, 2, 3]}, "ids must be a dense torch tensor, found builtins.list"),
        ({"queue": torch.zeros(3, 1)}, "not the state of a bank: its keys are"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inconsistent_state_raises_and_changes_nothing(change: dict[str, object], message: str) -> None:
    bank, saved = IndexedRing(5), IndexedRing(5)
    fill(saved, 3)
    fill(bank, 4, 10)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        bank.load_state_dict({**saved.state_dict(), **change})
    assert message in str(caught.value)
    assert numbers(bank.reconstruct(torch.arange(4))) == [10, 11, 12, 13]
    assert (bank.pushed, bank.loaded) == (4, None)
