"""Whatever kills a run, the next start continues it as if nothing had happened."""

import signal
from pathlib import Path

import pytest
from survival import assert_same_outcome, finish, interrupt_at_random


@pytest.mark.parametrize("times", [10, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_many_times_is_the_same_bit_for_bit(tmp_path: Path, times: int) -> None:
    finish(tmp_path / "undisturbed")
    ends, caught_saving = [], 0
    for kill in range(times):
        ends += interrupt_at_random(tmp_path / "run", signal.SIGKILL, times=1, seed=kill)
        caught_saving += any((tmp_path / "run" / "checkpoints").glob(".saving-*"))
    assert [code for code, _ in ends] == [-signal.SIGKILL] * times
    assert caught_saving > 0  # the run saves about half of its time
    finish(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".saving-*"))
    assert_same_outcome(tmp_path / "run", tmp_path / "undisturbed")
