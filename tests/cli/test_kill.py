"""A killed run resumes as if nothing had happened."""

import signal
import time
from pathlib import Path

import pytest
from survival import LONG, assert_same_outcome, finish, interrupt_at_random, started


def kill_while_saving(run_dir: Path) -> bool:
    """Start the long run, kill it when a checkpoint is half written, and return whether that left one behind."""
    checkpoints = run_dir / "checkpoints"
    with started(*LONG, "--out", run_dir) as process:
        old = set(checkpoints.glob(".saving-*"))
        while process.poll() is None:
            if set(checkpoints.glob(".saving-*")) - old:
                process.kill()
                break
            time.sleep(0.0002)  # a save takes some milliseconds
    return any(checkpoints.glob(".saving-*"))


@pytest.mark.parametrize("times", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_repeated_sigkill_changes_no_bit(tmp_path: Path, times: int) -> None:
    finish(tmp_path / "reference")
    ends, caught_saving = [], 0
    for kill in range(times // 2):
        ends += interrupt_at_random(tmp_path / "run", signal.SIGKILL, times=1, seed=kill)
        caught_saving += kill_while_saving(tmp_path / "run")
    assert [code for code, _ in ends] == [-signal.SIGKILL] * (times // 2)
    assert caught_saving > 0
    finish(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".saving-*"))
    assert_same_outcome(tmp_path / "run", tmp_path / "reference")
