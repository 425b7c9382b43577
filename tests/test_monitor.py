import time

import numpy as np
import pytest
import torch

from msf_faiss.errors import UserError
from msf_faiss.monitor import Clock, LossMonitor, NeighborMonitor

CPU = torch.device("cpu")


def test_purity_leaves_out_every_entry_of_the_own_image() -> None:
    monitor = NeighborMonitor(np.array([0, 0, 1, 1]), CPU)
    ids = torch.tensor([0, 2])
    neighbors = torch.tensor([[0, 1, 0, 2], [2, 0, 3, 3]])  # without the own: one of two right, two of three right
    ages = torch.tensor([[1, 10, 100, 20], [0, 30, 40, 50]])
    monitor.update(ids, neighbors, ages)
    purity, age = monitor.read()
    assert purity == pytest.approx(3 / 5)
    assert age == pytest.approx((10 + 20 + 30 + 40 + 50) / 5)
    assert monitor.read() == (None, 0.0)  # nothing since


def test_unlabelled_images_are_not_counted() -> None:
    monitor = NeighborMonitor(np.array([0, -1, 0, 1, -1]), CPU)
    monitor.update(torch.tensor([0, 1]), torch.tensor([[1, 2, 3], [0, 4, 2]]), torch.ones(2, 3))
    assert monitor.read() == (0.5, 1.0)
    unlabelled = NeighborMonitor(None, CPU)
    unlabelled.update(torch.tensor([0]), torch.tensor([[1, 2]]), torch.tensor([[4, 6]]))
    assert unlabelled.read() == (None, 5.0)


def test_the_first_loss_that_is_not_finite_is_named() -> None:
    monitor = LossMonitor()
    for loss in (1.0, 2.0):
        monitor.update(torch.tensor(loss))
    assert monitor.read(2) == 1.5
    for loss in (1.0, float("inf"), float("nan")):
        monitor.update(torch.tensor(loss))
    with pytest.raises(UserError, match="the loss of step 4 is inf"):
        monitor.read(5)


def test_the_clock_divides_the_time() -> None:
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
