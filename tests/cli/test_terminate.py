"""Signals stop a run with a checkpoint, and with an exit code that tells whether to start it again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from invoking import TINY
from survival import LONG, assert_same_outcome, finish, interrupt_at_random, read_until, started, workers_of


@pytest.mark.parametrize("times", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_repeated_sigterm_changes_no_bit(tmp_path: Path, times: int) -> None:
    finish(tmp_path / "reference")
    ends = interrupt_at_random(tmp_path / "run", signal.SIGTERM, times=times, seed=0)
    assert [code for code, _ in ends] == [75] * times
    for _, errors in ends:
        assert (
            "SIGTERM: stopping after this step with a checkpoint" in errors or "stopped before the first step" in errors
        )
        assert "Traceback" not in errors
    finish(tmp_path / "run")
    assert_same_outcome(tmp_path / "run", tmp_path / "reference")


@pytest.mark.parametrize(("number", "code"), [("SIGUSR1", 75), ("SIGTERM", 75), ("SIGINT", 130)])
def test_signal_to_the_process_group_saves_a_checkpoint(tmp_path: Path, number: str, code: int) -> None:
    """A scheduler signals workers too, which must not end the run."""
    if not hasattr(signal, number):
        pytest.skip(f"no {number} here")
    with started(*LONG, "--set", "data.workers=2", "--out", tmp_path / "run") as process:
        read_until(process, "step 4/")
        os.killpg(process.pid, getattr(signal, number))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert f"{number}: stopping after this step with a checkpoint" in errors
    assert "interrupted after step" in errors
    assert "Traceback" not in errors


def test_second_signal_stops_at_once_and_damages_nothing(tmp_path: Path) -> None:
    """Also while a step hangs, here because its worker is suspended and delivers no data."""
    with started(*LONG, "--set", "data.workers=1", "--out", tmp_path / "run") as process:
        read_until(process, "step 40/")
        for worker in workers_of(process.pid):
            os.kill(worker, signal.SIGSTOP)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        read_until(process, "SIGTERM: stopping after this step")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    assert process.returncode == 128 + signal.SIGTERM
    with started(*LONG, "--set", "data.workers=1", "--out", tmp_path / "run") as process:
        read_until(process, "resumed  after step")


def test_watchdog_ends_a_hung_step(tmp_path: Path) -> None:
    arguments = [*TINY, "--set", "data.workers=1", "--set", "train.epochs=1000", "--set", "train.hang_seconds=8"]
    with started(*arguments, "--out", tmp_path / "run") as process:
        read_until(process, "step 5/")
        workers = workers_of(process.pid)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        assert process.wait(60) == 75
        for worker in workers:  # they keep the pipe open
            os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert "no step finished within 8 seconds (train.hang_seconds). Stacks of all threads:" in errors
    assert "training_batches" in errors
    assert "start the same command again to resume" in errors
