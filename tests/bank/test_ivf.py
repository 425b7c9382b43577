"""Inverted lists that follow a ring: they hold what it holds, wherever it is in its rotation, and go on from a save."""

import ctypes
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from msf_faiss.bank import FlatBank, IvfBank, ReferenceBank
from msf_faiss.bank.ivf.inverted_lists import Centroids, InvertedLists, code_scale
from msf_faiss.bank.recall_monitor import RecallMonitor
from msf_faiss.search.faiss_setup import faiss

DIM = 32
CAPACITY = 3000
BATCH = 128
K = 6


class Clusters:
    """Unit vectors around 50 centres that may turn towards others."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._from, self._to = self._centres(), self._centres()
        self.angle = 0.0  # of the centres with where they began, in radians

    def draw(self, count: int) -> Tensor:
        along = (self._to * self._from).sum(dim=1, keepdim=True) * self._from
        centres = math.cos(self.angle) * self._from + math.sin(self.angle) * normalize(self._to - along, dim=1)
        noise = torch.randn(count, DIM, generator=self._generator) * 0.5 / DIM**0.5
        return normalize(centres[torch.randint(50, (count,), generator=self._generator)] + noise, dim=1)

    def turn(self) -> None:
        """Go on from here towards other centres."""
        self._from, self._to, self.angle = self._to, self._centres(), 0.0

    def _centres(self) -> Tensor:
        return normalize(torch.randn(50, DIM, generator=self._generator), dim=1)


def batches(source: Clusters, steps: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        first = start + step * BATCH
        yield source.draw(BATCH), torch.arange(first, first + BATCH)


def filled(steps: int = 60, **options: object) -> IvfBank:
    bank = IvfBank(CAPACITY, DIM, **options)  # type: ignore[arg-type]
    for vectors, ids in batches(Clusters(), steps):
        bank.push(vectors, ids)
    return bank


def recall(bank: IvfBank, queries: Tensor) -> float:
    """Share of the nearest others found, for queries that were pushed last."""
    found, exact = bank.search(queries, K).slots, bank.search_exactly(queries, K).slots
    own = exact[:, :1]
    assert torch.equal(own, found[:, :1])
    hits = (exact[:, 1:].unsqueeze(2) == found.unsqueeze(1)).any(dim=2)
    return float(hits.float().mean())


def assert_same(left: IvfBank, right: IvfBank, queries: Tensor) -> None:
    for ours, theirs in zip(left.search(queries, K), right.search(queries, K), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("segments", [1, 4])
def test_the_lists_hold_each_slot_once_after_rotations(segments: int) -> None:
    bank = filled(steps=150, segments=segments)
    state = bank.state_dict()
    held = [state[f"index.lists.part{number}.places"] for number in range(segments)]
    assert sum(len(places) for places in held) == CAPACITY - (
        len(state["index.lists.leaving.places"]) if segments > 1 else 0
    )
    for places in held:
        assert torch.equal(places.sort().values.long(), torch.arange(len(places)))
    if segments > 1:  # what the newest segment has not reached yet
        leaving = state["index.lists.leaving.places"].sort().values
        assert torch.equal(leaving.long(), torch.arange(len(held[bank.pushed % CAPACITY // 750]), 750))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", [1, 4])
def test_lists_that_were_updated_find_what_an_exact_search_finds_if_all_are_probed(
    dtype: torch.dtype, segments: int
) -> None:
    twin = ReferenceBank(CAPACITY, DIM, dtype)
    bank = IvfBank(CAPACITY, DIM, dtype, lists=16, probes=16, segments=segments)
    source = Clusters()
    for step, (vectors, ids) in enumerate(batches(source, 100)):
        bank.push(vectors, ids)
        twin.push(vectors, ids)
        if step % 7 == 0:
            # Of codes of 8 bits the best k + 8 hold the best k: the centres are far apart, and within .01 of the k-th
            # there are few others.
            for ours, theirs in zip(bank.search(vectors, K), twin.search(vectors, K), strict=True):
                assert torch.equal(ours, theirs)
    assert bank.metrics()["exact_ratio"] < 0.5


@pytest.mark.parametrize("segments", [1, 3])
def test_few_probes_find_nearly_all_from_the_first_lists_on(segments: int) -> None:
    bank, source = IvfBank(CAPACITY, DIM, segments=segments), Clusters()
    recalls = []
    for vectors, ids in batches(source, 100):
        bank.push(vectors, ids)
        recalls.append(recall(bank, vectors))
    assert min(recalls) > 0.9
    assert sum(recalls) / len(recalls) > 0.97
    readings = bank.metrics()
    assert readings["probes"] < 32
    assert 1 <= readings["list_imbalance"] < 4


def test_before_there_are_lists_the_search_is_exact() -> None:
    bank = filled(steps=3)
    assert "no lists yet" in repr(bank)

    bank.search(Clusters().draw(10), K)
    assert bank.metrics() == {"exact_ratio": 1.0}
    assert bank.metrics() == {}


def test_what_leaves_a_segment_is_never_found_by_selector_or_by_mask() -> None:
    source = Clusters()
    vectors = source.draw(400)
    centroids = Centroids(source.draw(8).contiguous())
    lists = InvertedLists(centroids, code_scale(vectors))
    lists.write(0, vectors, centroids.nearest(vectors, 1).lists[:, 0].contiguous())
    queries = source.draw(50)
    probes = centroids.nearest(queries, 8)
    everything, places = lists.search(queries, probes, 400, [(0, 400)])
    for ranges in ([(100, 400)], [(0, 37), (390, 400)], [(5, 6)]):
        selected, found = lists.search(queries, probes, 20, ranges)
        allowed = torch.zeros(400, dtype=torch.bool)
        for start, stop in ranges:
            allowed[start:stop] = True
        # The twin: over-fetch, then mask.
        best, order = everything.masked_fill(~allowed[places], -torch.inf).topk(20, dim=1)
        there = ~best.isneginf()
        assert torch.equal(selected[there], best[there])
        assert torch.equal(found[there], places.gather(1, order)[there])
        assert (found[~there] == -1).all()


def test_replaced_entries_decode_to_what_the_ring_holds() -> None:
    source = Clusters()
    centroids = Centroids(source.draw(8).contiguous())
    ring = source.draw(300)
    scale = code_scale(ring)
    lists = InvertedLists(centroids, scale)
    lists.write(0, ring, centroids.nearest(ring, 1).lists[:, 0].contiguous())
    for start in (0, 100, 250, 30, 250):  # the last ones replace some and append none
        vectors = source.draw(50)
        ring[start : start + 50] = vectors
        lists.write(start, vectors, centroids.nearest(vectors, 1).lists[:, 0].contiguous())
    assert len(lists) == 300
    # All lists are probed, so each entry finds its own code; half a step of 1/127 in each of 32 components.
    similarities, places = lists.search(ring, centroids.nearest(ring, 8), 1, [(0, 300)])
    assert (places[:, 0] == torch.arange(300)).float().mean() > 0.99
    torch.testing.assert_close(similarities[:, 0], torch.ones(300), rtol=0, atol=0.5 / scale * DIM**0.5)


def held(part: InvertedLists, first: int) -> dict[int, tuple[int, bytes]]:
    """List and code of each place from `first` on, as FAISS has them."""
    lists, found = part._index.invlists, {}
    for number in range(lists.nlist):
        if size := lists.list_size(number):
            places = faiss.rev_swig_ptr(lists.get_ids(number), size)
            codes = faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size).reshape(size, -1)
            here = {int(place): (number, code.tobytes()) for place, code in zip(places, codes, strict=True)}
            assert len(here) == size
            assert not here.keys() & found.keys()
            found |= here
    return {place: entry for place, entry in found.items() if place >= first}


@pytest.mark.parametrize("segments", [1, 4])
def test_lists_that_were_updated_are_those_of_an_index_made_from_the_ring(
    segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same entries in the same lists, by the list that each was given when it came, and with the same codes."""
    write = InvertedLists.write

    def noted(self: InvertedLists, place: int, vectors: Tensor, lists: Tensor) -> None:
        self.__dict__.setdefault("given", {}).update(enumerate(lists.tolist(), start=place))
        write(self, place, vectors, lists)

    monkeypatch.setattr(InvertedLists, "write", noted)
    bank, source = filled(segments=segments), Clusters(seed=1)
    size = CAPACITY // segments
    for vectors, ids in batches(source, 100):
        bank.push(vectors, ids)
        assert bank._lists is not None
        parts = list(bank._lists._held())
        assert sum(len(part) - first for _, part, first in parts) == CAPACITY
    for number, part, first in parts:
        again = InvertedLists(part.centroids, part._scale)
        entries = bank._entries[number * size : number * size + len(part)]
        again.write(0, entries, torch.tensor([part.__dict__["given"][place] for place in range(len(part))]))
        assert held(part, first) == held(again, first)
        assert held(part, first).keys() == set(range(first, len(part)))


def memory_of_lists(bank: IvfBank) -> int:
    """Bytes that FAISS holds for codes and ids, slack included, as the C library tells."""
    usable = getattr(ctypes.CDLL(None), "malloc_usable_size", None)
    if usable is None:
        pytest.skip("only glibc tells")
    usable.restype, usable.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    assert bank._lists is not None
    every = [faiss.downcast_InvertedLists(part._index.invlists) for _, part, _ in bank._lists._held()]
    return sum(
        usable(int(pointer))
        for lists in every
        for number in range(lists.nlist)
        for pointer in (lists.get_codes(number), lists.get_ids(number))
        if pointer is not None
    )


@pytest.mark.parametrize(("segments", "most"), [(1, 3.0), (4, 2.0)])
def test_lists_that_never_shrink_take_no_more_and_more(segments: int, most: float) -> None:
    """FAISS doubles a list that is full, and lists of 23 entries on average are now and then half as long again.

    A segment's lists begin anew in each rotation, so that they only double, but beside those that are leaving.
    """
    bank, source = IvfBank(CAPACITY, DIM, segments=segments), Clusters()
    steps = CAPACITY // BATCH
    taken = []
    for _ in range(6):
        for step in range(steps):
            source.angle = math.acos(0.3) * (step + 1) / steps
            bank.push(source.draw(BATCH), torch.arange(BATCH))
        source.turn()
        taken.append(memory_of_lists(bank) / (CAPACITY * (DIM + 8)))
    assert min(taken) >= 1  # what there is to hold
    assert max(taken) <= most


@pytest.mark.parametrize("segments", [1, 4])
@pytest.mark.parametrize("steps", [5, 8, 12, 30, 61])  # before lists, while they are made, and in later rotations
def test_a_bank_that_was_saved_goes_on_as_if_it_had_not(steps: int, segments: int) -> None:
    bank = filled(steps, segments=segments)
    state = {name: value.clone() for name, value in bank.state_dict().items()}
    copy = IvfBank(CAPACITY, DIM, segments=segments)
    copy.load_state_dict(state)
    source = Clusters(seed=1)
    for vectors, ids in batches(source, 40, start=bank.pushed):
        assert_same(bank, copy, vectors)
        for each in (bank, copy):
            each.push(vectors, ids)
        assert_same(bank, copy, vectors)
    ours, theirs = bank.state_dict(), copy.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert bank.metrics() == copy.metrics()


def test_the_lists_of_other_settings_are_not_taken_over() -> None:
    bank = filled()
    other = IvfBank(CAPACITY, DIM, lists=7)
    other.load_state_dict(bank.state_dict())
    assert "7 lists" in repr(other)
    assert recall(other, bank.reconstruct((bank.pushed - 1 - torch.arange(50)) % CAPACITY)) > 0.9


def test_a_bank_of_another_kind_gets_its_lists_at_once() -> None:
    flat = FlatBank(CAPACITY, DIM)
    for vectors, ids in batches(Clusters(), 30):
        flat.push(vectors, ids)
    bank = IvfBank(CAPACITY, DIM)
    bank.load_state_dict(flat.state_dict())
    assert "128 lists" in repr(bank)
    found, expected = bank.search(vectors, 1), flat.search(vectors, 1)
    assert torch.equal(found.slots, expected.slots)
    assert bank.metrics()["exact_ratio"] == 0


def test_saved_lists_with_a_part_missing_are_refused() -> None:
    state = filled().state_dict()
    del state["index.counters"]
    with pytest.raises(ValueError, match="incomplete: 'counters' is missing"):
        IvfBank(CAPACITY, DIM).load_state_dict(state)
    state = filled().state_dict()
    state["index.lists.part0.places"] = state["index.lists.part0.places"].clone().fill_(3)
    with pytest.raises(ValueError, match="places"):
        IvfBank(CAPACITY, DIM).load_state_dict(state)


def test_a_push_of_more_than_the_capacity_replaces_everything() -> None:
    bank, twin = filled(), ReferenceBank(CAPACITY, DIM)
    vectors = Clusters(seed=2).draw(CAPACITY + 500)
    for each in (bank, twin):
        each.push(vectors, torch.arange(len(vectors)))
    found, expected = (each.search(vectors[-BATCH:], K) for each in (bank, twin))
    assert torch.equal(found.similarities, expected.similarities)
    assert torch.equal(bank.ids(found.slots), twin.ids(expected.slots))


def test_making_lists_takes_a_bounded_part_of_any_push(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, nearest = [], Centroids.nearest

    def counted(self: Centroids, vectors: Tensor, count: int) -> object:
        compared.append(len(vectors))
        return nearest(self, vectors, count)

    monkeypatch.setattr(Centroids, "nearest", counted)
    bank = IvfBank(CAPACITY, DIM)
    most = 0
    for vectors, ids in batches(Clusters(), 60):
        compared.clear()
        bank.push(vectors, ids)
        most = max(most, sum(compared))
    # The batch in the lists and in those that are being made, four rows for each of it, and once the sampled queries.
    assert 4 * BATCH <= most <= 6 * BATCH + 64


def drifting_recall(bank: IvfBank, monkeypatch: pytest.MonkeyPatch | None = None) -> float:
    """The least mean recall of a rotation, of three in which the centres turn to a cosine of .3."""
    source = Clusters()
    for vectors, ids in batches(source, 40):
        bank.push(vectors, ids)
    steps = CAPACITY // BATCH
    least = 1.0
    for _ in range(3):
        recalls = []
        for step in range(steps):
            source.angle = math.acos(0.3) * (step + 1) / steps
            vectors = source.draw(BATCH)
            bank.push(vectors, torch.arange(BATCH))
            recalls.append(recall(bank, vectors))
        source.turn()
        least = min(least, sum(recalls) / len(recalls))
    return least


def test_lists_follow_an_encoder_that_drifts_and_frozen_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # Four lists of 64, and nothing exact but the last push: what only the centroids can hold.
    followed = drifting_recall(IvfBank(CAPACITY, DIM, lists=64, probes=4))
    segments = drifting_recall(IvfBank(CAPACITY, DIM, lists=16, probes=4, segments=4))
    monkeypatch.setattr(Centroids, "follow", lambda self, vectors, lists, rate: None)
    frozen = drifting_recall(IvfBank(CAPACITY, DIM, lists=64, probes=4))
    assert frozen < followed - 0.05
    assert followed > 0.9
    assert segments > 0.95


def test_improving_ends_in_an_exact_search() -> None:
    bank, source = filled(lists=64, probes=1), Clusters(seed=3)
    said = []
    while "exact from now on" not in (said or [""])[-1]:
        said.append(bank.raise_recall())
        while "until then" in said[-1] and "1 probed" not in repr(bank):
            bank.push(source.draw(BATCH), torch.arange(BATCH))
    assert said[:2] == [f"a query probes {probes} of 64 lists from now on" for probes in (2, 4)]
    assert sum("made anew, and the search is exact" in words for words in said) == 1
    queries = source.draw(BATCH)
    bank.push(queries, torch.arange(BATCH))
    assert recall(bank, queries) == 1.0
    copy = IvfBank(CAPACITY, DIM, lists=64, probes=1)
    copy.load_state_dict(bank.state_dict())
    assert_same(bank, copy, queries)
    assert copy.metrics()["exact_ratio"] == 1.0


def test_a_bank_that_is_replaced_while_its_lists_are_remade_gets_lists_again() -> None:
    bank = filled(lists=16, probes=4)
    assert "exact until then" in bank.raise_recall()
    assert "exact already" in bank.raise_recall()
    source = Clusters(seed=3)
    bank.push(source.draw(bank.capacity), torch.arange(bank.capacity))
    for vectors, ids in batches(source, 60):
        bank.push(vectors, ids)
    bank.metrics()
    bank.search(vectors, 5)
    assert bank.metrics()["exact_ratio"] == 0


def test_lists_that_the_encoder_left_behind_are_made_anew() -> None:
    """All new entries are near one centroid, whose list takes them all in; nothing is missed, but all of it is read."""
    bank = filled(lists=64)
    generator = torch.Generator().manual_seed(5)
    worst = 0.0
    for number in range(6 * CAPACITY // BATCH):
        noise = torch.randn(BATCH, DIM, generator=generator)
        bank.push(normalize(torch.eye(DIM)[0] + 0.1 * noise, dim=1), torch.arange(BATCH) + number)
        if bank._lists is not None:
            worst = max(worst, bank._lists.imbalance)
    assert worst > 10
    assert bank.metrics()["list_imbalance"] < 4
    assert recall(bank, bank.reconstruct((bank.pushed - 1 - torch.arange(BATCH)) % CAPACITY)) > 0.9


def test_an_empty_bank_is_searched_exactly_too() -> None:
    found = IvfBank(100, DIM).search_exactly(torch.zeros(3, DIM), 5)
    assert found.slots.shape == found.similarities.shape == (3, 0)


def test_a_watched_bank_raises_its_probes_until_it_keeps_what_it_promised() -> None:
    generator = torch.Generator().manual_seed(0)
    bank = IvfBank(CAPACITY, DIM, lists=64, probes=1)  # of vectors without clusters, one list holds few neighbours
    watch = RecallMonitor(every_steps=1, queries=64, min_recall=0.9)
    words, recalls = [], []
    for step in range(1, 120):
        vectors = normalize(torch.randn(BATCH, DIM, generator=generator), dim=1)
        bank.push(vectors, torch.arange(BATCH))
        words.append(watch.check(bank, bank.search(vectors, K), step))
        recalls.append(recall(bank, vectors))
    raised = [text for text in words if text is not None]
    assert raised[0].startswith("recall 0.")
    assert "a query probes 2 of 64 lists from now on" in raised[0]
    assert min(recalls[-20:]) > 0.85  # what is promised holds for the checks' queries


def test_probes_that_hold_too_few_entries_are_made_up_for_exactly() -> None:
    bank, twin = IvfBank(CAPACITY, DIM, lists=64, probes=1), ReferenceBank(CAPACITY, DIM)
    for vectors, ids in batches(Clusters(), 40):
        bank.push(vectors, ids)
        twin.push(vectors, ids)
    bank.metrics()
    queries = vectors[:20]
    for ours, theirs in zip(bank.search(queries, 1000), twin.search(queries, 1000), strict=True):
        assert torch.equal(ours, theirs)
    assert bank.metrics()["exact_ratio"] == 1.0


def test_a_query_that_is_not_a_number_is_answered_with_some_entries() -> None:
    bank = filled()
    queries = Clusters().draw(3)
    queries[1] = torch.nan
    found = bank.search(queries, K)
    assert found.similarities[1].isnan().all()
    assert ((found.slots >= 0) & (found.slots < CAPACITY)).all()
    assert_same(bank, bank, queries[[0, 2]])


@pytest.mark.parametrize("batch", [1, 64, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_lists_are_probed_does_not_depend_on_the_batch(batch: int, dtype: torch.dtype) -> None:
    """Of a whole batch that was just pushed they are known already."""
    bank, source = IvfBank(CAPACITY, DIM, dtype, lists=64, probes=2), Clusters()
    for vectors, ids in batches(source, 60):
        bank.push(vectors, ids)
    whole, part = bank.search(vectors, K), bank.search(vectors[:batch], K)
    assert torch.equal(whole.slots[:batch], part.slots)
    assert torch.equal(whole.similarities[:batch], part.similarities)
    assert bank.metrics()["exact_ratio"] < 0.1


@pytest.mark.parametrize(("older", "newest"), [(20, 1), (0, 40)])
def test_the_own_entry_is_found_among_many_equals(older: int, newest: int) -> None:
    """A code is rounded, so that an older equal may seem more similar than the entry itself."""
    bank, twins = filled(lists=16), Clusters(seed=1).draw(10)
    for vectors in (twins.repeat(older, 1), Clusters(seed=2).draw(20), twins.repeat(newest, 1)):
        bank.push(vectors, torch.arange(len(vectors)))
    bank.metrics()
    assert bank.age(bank.search(twins, 5).slots)[:, 0].tolist() == list(range(9, -1, -1))
    assert bank.metrics()["exact_ratio"] == 0


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="on a GPU choose kind flat or scan"):
        IvfBank(10, DIM, device="cuda")
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        IvfBank(10, DIM, torch.float64)
    with pytest.raises(ValueError, match="10 entries are too few for 4 segments of 9 lists"):
        IvfBank(10, DIM, lists=9, segments=4)
    with pytest.raises(ValueError, match="10 entries are too few for 11 segments"):
        IvfBank(10, DIM, segments=11)
