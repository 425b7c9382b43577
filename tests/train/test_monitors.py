import math
import time
from collections import Counter

import numpy as np
import pytest
import torch

from msf_faiss.errors import UserError
from msf_faiss.train.clock import Clock
from msf_faiss.train.monitors import CollapseMonitor, LossMonitor, NeighborMonitor, Spread, measure_spread

CPU = torch.device("cpu")


def test_statistics_exclude_entries_of_the_query_image() -> None:
    monitor = NeighborMonitor(np.array([0, 0, 1, 1]), CPU)
    ids = torch.tensor([0, 2])
    neighbors = torch.tensor([[0, 1, 0, 2], [2, 0, 3, 3]])  # own image excluded: one of two, two of three match
    ages = torch.tensor([[1, 10, 100, 20], [0, 30, 40, 50]])
    monitor.update(ids, neighbors, ages, 200)
    found = monitor.summarize()
    assert found.purity == pytest.approx(3 / 5)
    assert found.age_mean == pytest.approx((10 + 20 + 30 + 40 + 50) / 5)
    assert found.age_p95 == 50
    assert found.hubness == pytest.approx(1 / 2)  # five entries, each retrieved by one of two queries
    assert monitor.summarize() == (None, 0.0, 0.0, 0.0)  # starts over


def test_hubness_counts_entries_not_slots_or_images() -> None:
    """The age of an entry changes with each step."""
    monitor = NeighborMonitor(None, CPU)
    for step in range(4):
        ids = torch.tensor([2 * step, 2 * step + 1]) + 100
        ages = torch.tensor([[1, 10 + 2 * step], [0, 10 + 2 * step]])  # every query retrieves entry number 89
        monitor.update(ids, torch.stack([ids, torch.tensor([7, 8])], dim=1), ages, pushed=100 + 2 * step)
    assert monitor.summarize().hubness == 1.0


def test_percentile_and_hubness_of_the_sample() -> None:
    rng = np.random.default_rng(0)
    monitor, ages_seen, numbers = NeighborMonitor(None, CPU), [], []
    for step in range(5):
        ages = torch.from_numpy(rng.integers(0, 50, (80, 3)))
        monitor.update(torch.arange(80), torch.full((80, 3), 1000), ages, pushed=60 + 80 * step)
        ages_seen += ages[:64].flatten().tolist()
        numbers += (60 + 80 * step - 1 - ages[:64]).flatten().tolist()
    found = monitor.summarize()
    assert found.age_p95 == sorted(ages_seen)[math.ceil(0.95 * (len(ages_seen) - 1))]
    ten = sorted(Counter(numbers).values())[-10:]
    assert found.hubness == pytest.approx(sum(ten) / 10 / 320)


def test_purity_ignores_unlabelled_images() -> None:
    monitor = NeighborMonitor(np.array([0, -1, 0, 1, -1]), CPU)
    monitor.update(torch.tensor([0, 1]), torch.tensor([[1, 2, 3], [0, 4, 2]]), torch.ones(2, 3, dtype=torch.int64), 9)
    assert monitor.summarize()[:2] == (0.5, 1.0)
    unlabelled = NeighborMonitor(None, CPU)
    unlabelled.update(torch.tensor([0]), torch.tensor([[1, 2]]), torch.tensor([[4, 6]]), 9)
    assert unlabelled.summarize()[:2] == (None, 5.0)


def test_first_non_finite_loss_is_named() -> None:
    monitor = LossMonitor()
    for loss in (1.0, 2.0):
        monitor.update(torch.tensor(loss))
    assert monitor.mean(2) == 1.5
    for loss in (1.0, float("inf"), float("nan")):
        monitor.update(torch.tensor(loss))
    with pytest.raises(UserError, match="the loss of step 4 is inf"):
        monitor.mean(5)


def test_clock_attributes_time_to_parts() -> None:
    began = time.perf_counter()
    clock = Clock(CPU)
    with clock.on_host("data"):
        sum(range(20_000))
    with clock.on_device("bank"):
        sum(range(20_000))
    with clock.on_host("data"):
        sum(range(20_000))
    with clock.paused():
        start = time.perf_counter()
        time.sleep(0.2)
        pause = time.perf_counter() - start
    total, parts = clock.read()
    assert total < time.perf_counter() - began - pause
    assert parts.keys() == {"data", "bank"}
    assert 0 < sum(parts.values()) <= total
    assert clock.read()[1] == {}


def test_spread_of_embeddings() -> None:
    rng = torch.Generator().manual_seed(0)
    even = torch.nn.functional.normalize(torch.randn(256, 32, generator=rng), dim=1)
    spread = measure_spread(even)
    assert spread.std == pytest.approx(1, abs=0.01)
    assert 28 < spread.effective_rank <= 32
    same = even[:1].expand(256, -1)
    assert measure_spread(same) == pytest.approx((0, 1), abs=1e-3)
    plane = torch.nn.functional.normalize(even[:, :2], dim=1)
    assert measure_spread(torch.cat([plane, torch.zeros(256, 30)], dim=1)).effective_rank == pytest.approx(2, abs=0.05)
    wide = torch.nn.functional.normalize(torch.randn(10, 500, generator=rng), dim=1)
    assert 9 < measure_spread(wide).effective_rank <= 10
    # the same from the singular values
    values = torch.linalg.svdvals(even.double())
    shares = values / values.sum()
    assert spread.effective_rank == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-9)


def test_collapse_is_detected_once_with_the_step_where_it_began() -> None:
    monitor, well, low = CollapseMonitor(), Spread(0.9, 20.0), Spread(0.05, 20.0)
    assert [monitor.update(low, step) for step in (10, 20)] == [False, False]
    assert not monitor.update(well, 30)  # two are chance
    assert [monitor.update(low, step) for step in (40, 50)] == [False, False]
    assert monitor.since is None
    again = CollapseMonitor()
    again.load_state_dict(monitor.state_dict())
    assert [again.update(Spread(0.9, 1.5), 60), again.update(low, 70)] == [True, False]
    assert again.since == 40
    again.update(well, 80)
    assert again.since is None
