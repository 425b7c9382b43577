"""Training processes that are interrupted at random moments, and a comparison of their results."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from command_server import Command
from invoking import TINY
from runs import metrics, tensors

LONG = [
    *TINY,
    *("--set", "train.epochs=50", "--set", "checkpoint.every_epochs=1", "--set", "knn.every_epochs=10"),
    *("--set", "train.log_every=4"),
]
"""The tiny run with 150 steps, saved every third step."""


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`msf-faiss pretrain` in a process group of its own, which is killed on leaving the context."""
    process = Command("pretrain", *arguments, stderr=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # including suspended workers, which keep the pipe open
        process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"the process ended without {text!r}: {''.join(lines)}")


def interrupt_at_random(run_dir: Path, number: signal.Signals, *, times: int, seed: int) -> list[tuple[int, str]]:
    """Start the long run `times` times, and send it a signal at a random moment of its training.

    Returns:
        Exit code and stderr of each process.
    """
    moments, ends = random.Random(seed), []
    for _ in range(times):
        with started(*LONG, "--out", run_dir) as process:
            read_until(process, "/150 ")
            time.sleep(moments.uniform(0, 0.1))
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
            ends.append((process.returncode, errors))
    return ends


def finish(run_dir: Path) -> None:
    """Run the long run to its end."""
    with started(*LONG, "--out", run_dir) as process:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def outcome(run_dir: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    """The tensors of the last checkpoint, and metrics.jsonl without timings."""
    last = max((run_dir / "checkpoints").glob("step-*"))
    return tensors(run_dir, int(last.name.removeprefix("step-"))), metrics(run_dir)


def assert_same_outcome(run_dir: Path, reference: Path) -> None:
    """Bit for bit: weights, momenta, bank, monitors, and all metrics but timings."""
    (tensors, lines), (expected, expected_lines) = outcome(run_dir), outcome(reference)
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
    assert {"step": 150}.items() <= lines[-1].items()
    assert lines == expected_lines


def workers_of(main: int) -> list[int]:
    """Data workers of the process `main`: children of its fork server."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    children = [process for process, parent in parents.items() if parent == main]
    found = [process for process, parent in parents.items() if parent in children]
    assert found
    return found
