"""A killed run resumes as if nothing had happened."""

import signal
from pathlib import Path

import pytest
from survival import assert_same_outcome, finish, interrupt_at_random


@pytest.mark.parametrize("times", [10, pytest.param(20, marks=pytest.mark.slow)])
def test_repeated_sigkill_changes_no_bit(tmp_path: Path, times: int) -> None:
    finish(tmp_path / "reference")
    ends, caught_saving = [], 0
    for kill in range(times):
        ends += interrupt_at_random(tmp_path / "run", signal.SIGKILL, times=1, seed=kill)
        caught_saving += any((tmp_path / "run" / "checkpoints").glob(".saving-*"))
    assert [code for code, _ in ends] == [-signal.SIGKILL] * times
    assert caught_saving > 0  # the run is saving about half of the time
    finish(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".saving-*"))
    assert_same_outcome(tmp_path / "run", tmp_path / "reference")
