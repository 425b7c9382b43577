"""The bank of inverted lists: recall, exact fallbacks, builds, and resuming."""

import pytest
import torch
from clusters import (
    BATCH,
    CAPACITY,
    DIM,
    SPEC,
    Clusters,
    K,
    assert_same_neighbors,
    batches,
    cloned_state,
    drift,
    filled,
    recall,
)
from torch import Tensor
from torch.nn.functional import normalize

from msf_faiss.bank import FlatBank, IvfBank, ReferenceBank, RingSpec
from msf_faiss.bank.ivf.inverted_lists import Centroids
from msf_faiss.bank.recall_monitor import RecallMonitor


@pytest.mark.parametrize(("segments", "dtype"), [(1, torch.bfloat16), (4, torch.float32)], ids=str)
def test_probing_all_lists_is_exact(dtype: torch.dtype, segments: int) -> None:
    spec = RingSpec(CAPACITY, DIM, dtype)
    reference, bank = ReferenceBank(spec), IvfBank(spec, lists=16, probes=16, segments=segments)
    for step, (vectors, ids) in enumerate(batches(Clusters(), 60)):
        bank.push(vectors, ids)
        reference.push(vectors, ids)
        if step % 7 == 0:
            # The best k + 8 of the 8-bit codes include the best k: few other entries are within .01 of the k-th.
            assert_same_neighbors(bank, reference, vectors)
    assert bank.metrics()["exact_ratio"] < 0.5


@pytest.mark.parametrize("segments", [1, 3])
def test_recall_with_few_probes(segments: int) -> None:
    bank, recalls = IvfBank(SPEC, segments=segments), []
    for vectors, ids in batches(Clusters(), 100):
        bank.push(vectors, ids)
        recalls.append(recall(bank, vectors))
    assert min(recalls) > 0.9
    assert sum(recalls) / len(recalls) > 0.97
    metrics = bank.metrics()
    assert metrics["probes"] < 32
    assert 1 <= metrics["list_imbalance"] < 4


def test_search_is_exact_before_there_are_lists() -> None:
    bank = filled(steps=3)
    assert "no lists yet" in repr(bank)
    bank.search(Clusters().draw(10), K)
    assert bank.metrics() == {"exact_ratio": 1.0}
    assert bank.metrics() == {}


# Before lists, during the build, and in later rotations.
@pytest.mark.parametrize(("steps", "segments"), [(5, 4), (8, 1), (12, 4), (30, 4), (61, 1)])
def test_resumed_bank_continues_bit_for_bit(steps: int, segments: int) -> None:
    bank, copy = filled(steps, segments=segments), IvfBank(SPEC, segments=segments)
    copy.load_state_dict(cloned_state(bank))
    for vectors, ids in batches(Clusters(seed=1), 40, start=bank.pushed):
        assert_same_neighbors(bank, copy, vectors)
        for each in (bank, copy):
            each.push(vectors, ids)
        assert_same_neighbors(bank, copy, vectors)
    ours, theirs = bank.state_dict(), copy.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert bank.metrics() == copy.metrics()


def test_lists_of_other_settings_are_rebuilt() -> None:
    bank = filled()
    other = IvfBank(SPEC, lists=7)
    other.load_state_dict(bank.state_dict())
    assert "7 lists" in repr(other)
    assert recall(other, bank.reconstruct(bank.newest(50))) > 0.9


@pytest.mark.parametrize("segments", [1, 4])
def test_saved_centroids_that_are_not_finite_are_rebuilt(segments: int) -> None:
    """As earlier versions saved them after a vector that was not finite; a centroid of NaNs attracts everything."""
    bank, copy = filled(segments=segments), IvfBank(SPEC, segments=segments)
    state = cloned_state(bank)
    for name in [name for name in state if name.endswith("centroids") and state[name].numel()]:
        state[name][3] = torch.nan
    copy.load_state_dict(state)
    assert recall(copy, bank.reconstruct(bank.newest(BATCH))) > 0.9
    assert copy.metrics()["list_imbalance"] < 4


def test_loading_a_bank_of_other_kind_builds_lists() -> None:
    flat, bank = FlatBank(SPEC), IvfBank(SPEC)
    for vectors, ids in batches(Clusters(), 30):
        flat.push(vectors, ids)
    bank.load_state_dict(flat.state_dict())
    assert "128 lists" in repr(bank)
    assert_same_neighbors(bank, flat, vectors, k=1)
    assert bank.metrics()["exact_ratio"] == 0


def test_incomplete_saved_lists_raise_value_error() -> None:
    state = filled().state_dict()
    places = "index.lists.part0.places"
    with pytest.raises(ValueError, match="places"):
        IvfBank(SPEC).load_state_dict({**state, places: state[places].clone().fill_(3)})
    del state["index.counters"]
    with pytest.raises(ValueError, match="incomplete: 'counters' is missing"):
        IvfBank(SPEC).load_state_dict(state)


def test_push_of_more_than_capacity_replaces_all_entries() -> None:
    bank, reference = filled(), ReferenceBank(SPEC)
    vectors = Clusters(seed=2).draw(CAPACITY + 500)
    for each in (bank, reference):
        each.push(vectors, torch.arange(len(vectors)))
    found, expected = (each.search(vectors[-BATCH:], K) for each in (bank, reference))
    assert torch.equal(found.similarities, expected.similarities)
    assert torch.equal(bank.ids(found.slots), reference.ids(expected.slots))


def test_build_does_bounded_work_per_push(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, nearest = [], Centroids.nearest

    def nearest_and_count(self: Centroids, vectors: Tensor, count: int) -> object:
        compared.append(len(vectors))
        return nearest(self, vectors, count)

    monkeypatch.setattr(Centroids, "nearest", nearest_and_count)
    bank, most = IvfBank(SPEC), 0
    for vectors, ids in batches(Clusters(), 60):
        compared.clear()
        bank.push(vectors, ids)
        most = max(most, sum(compared))
    # The batch in the present and in the new lists, four rows for each of its vectors, and once the sampled queries.
    assert 4 * BATCH <= most <= 6 * BATCH + 64


def drifting_recall(bank: IvfBank) -> float:
    """Least mean recall of three rotations in which the centres move."""
    source = Clusters()
    for vectors, ids in batches(source, 40):
        bank.push(vectors, ids)
    recalls: list[list[float]] = [[], [], []]
    for rotation, vectors in drift(source, rotations=3):
        bank.push(vectors, torch.arange(BATCH))
        recalls[rotation].append(recall(bank, vectors))
    return min(sum(each) / len(each) for each in recalls)


def test_moving_centroids_keep_recall_under_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    followed = drifting_recall(IvfBank(SPEC, lists=64, probes=4))
    segments = drifting_recall(IvfBank(SPEC, lists=16, probes=4, segments=4))
    monkeypatch.setattr(Centroids, "follow", lambda self, vectors, lists, rate: None)
    frozen = drifting_recall(IvfBank(SPEC, lists=64, probes=4))
    assert frozen < followed - 0.05
    assert followed > 0.9
    assert segments > 0.95


def test_raise_recall_ends_in_exact_search_and_is_saved() -> None:
    bank, source, changes = filled(lists=64, probes=1), Clusters(seed=3), [""]
    while "exactly from now on" not in changes[-1]:
        changes.append(bank.raise_recall())
        while "until then" in changes[-1] and "1 probed" not in repr(bank):
            bank.push(source.draw(BATCH), torch.arange(BATCH))
    assert changes[1:3] == [f"a query probes {probes} of 64 lists from now on" for probes in (2, 4)]
    assert sum("rebuilds its lists" in change for change in changes) == 1
    queries = source.draw(BATCH)
    bank.push(queries, torch.arange(BATCH))
    assert recall(bank, queries) == 1.0
    copy = IvfBank(SPEC, lists=64, probes=1)
    copy.load_state_dict(bank.state_dict())
    assert_same_neighbors(bank, copy, queries)
    assert copy.metrics()["exact_ratio"] == 1.0


def test_bank_replaced_during_rebuild_gets_lists_again() -> None:
    bank, source = filled(lists=16, probes=4), Clusters(seed=3)
    assert "exactly until then" in bank.raise_recall()
    assert "exact already" in bank.raise_recall()
    bank.push(source.draw(bank.capacity), torch.arange(bank.capacity))
    for vectors, ids in batches(source, 60):
        bank.push(vectors, ids)
    bank.metrics()
    bank.search(vectors, 5)
    assert bank.metrics()["exact_ratio"] == 0


def test_unequal_lists_are_rebuilt() -> None:
    """All new entries are near one centroid, whose list grows until a search reads most of the bank."""
    bank, generator, worst = filled(lists=64), torch.Generator().manual_seed(5), 0.0
    for number in range(6 * CAPACITY // BATCH):
        noise = torch.randn(BATCH, DIM, generator=generator)
        bank.push(normalize(torch.eye(DIM)[0] + 0.1 * noise, dim=1), torch.arange(BATCH) + number)
        worst = max(worst, bank.metrics().get("list_imbalance", 0))
    assert worst > 10
    assert bank.metrics()["list_imbalance"] < 4
    assert recall(bank, bank.reconstruct(bank.newest(BATCH))) > 0.9


def test_recall_monitor_raises_probes_to_min_recall_in_one_check() -> None:
    generator = torch.Generator().manual_seed(0)
    bank = IvfBank(SPEC, lists=256, probes=1)  # without clusters, one list has few of the neighbours
    monitor = RecallMonitor(every_steps=60, queries=BATCH, min_recall=0.7)
    for step in range(1, 61):
        vectors = normalize(torch.randn(BATCH, DIM, generator=generator), dim=1)
        bank.push(vectors, torch.arange(BATCH))
        before = recall(bank, vectors)
        change = monitor.check(bank, bank.search(vectors, K), step)
    assert before < 0.2
    assert change is not None
    assert change == f"recall {before:.3f} is below 0.7: a query probes 32 of 256 lists from now on"
    assert recall(bank, vectors) >= 0.7


def test_probes_with_fewer_than_k_entries_are_searched_exactly() -> None:
    bank, reference = IvfBank(SPEC, lists=64, probes=1), ReferenceBank(SPEC)
    for vectors, ids in batches(Clusters(), 40):
        bank.push(vectors, ids)
        reference.push(vectors, ids)
    bank.metrics()
    assert_same_neighbors(bank, reference, vectors[:20], k=1000)
    assert bank.metrics()["exact_ratio"] == 1.0


@pytest.mark.parametrize("batch", [1, 64, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probes_do_not_depend_on_batch_size(batch: int, dtype: torch.dtype) -> None:
    """The push computes the probes of a whole batch; a part of it computes its own."""
    bank = IvfBank(RingSpec(CAPACITY, DIM, dtype), lists=64, probes=2)
    for vectors, ids in batches(Clusters(), 60):
        bank.push(vectors, ids)
    whole, part = bank.search(vectors, K), bank.search(vectors[:batch], K)
    assert torch.equal(whole.slots[:batch], part.slots)
    assert torch.equal(whole.similarities[:batch], part.similarities)
    assert bank.metrics()["exact_ratio"] < 0.1


@pytest.mark.parametrize(("older", "newest"), [(20, 1), (0, 40)])
def test_own_entry_comes_first_among_copies(older: int, newest: int) -> None:
    """Codes are rounded, so the code of an older copy may seem more similar than the entry itself."""
    bank, twins = filled(lists=16), Clusters(seed=1).draw(10)
    for vectors in (twins.repeat(older, 1), Clusters(seed=2).draw(20), twins.repeat(newest, 1)):
        bank.push(vectors, torch.arange(len(vectors)))
    bank.metrics()
    assert bank.age(bank.search(twins, 5).slots)[:, 0].tolist() == list(range(9, -1, -1))
    assert bank.metrics()["exact_ratio"] == 0


def test_invalid_arguments_raise_value_error() -> None:
    with pytest.raises(ValueError, match=r"IvfBank runs on the CPU only; on cuda choose bank\.kind flat"):
        IvfBank(RingSpec(10, DIM, device="cuda"))
    with pytest.raises(ValueError, match=r"stores float32, float16, bfloat16, not torch\.float64"):
        IvfBank(RingSpec(10, DIM, torch.float64))
    with pytest.raises(ValueError, match="10 entries are too few for 4 segments of 9 lists"):
        IvfBank(RingSpec(10, DIM), lists=9, segments=4)
    with pytest.raises(ValueError, match="10 entries are too few for 11 segments"):
        IvfBank(RingSpec(10, DIM), segments=11)
