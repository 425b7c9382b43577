"""Work in processes: in order, mistakes in one piece, and nothing left behind."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torch.utils.data import dataloader

from msf_faiss.data.workers import load, warm_up
from msf_faiss.errors import UserError


def square(number: int) -> int:
    if number == 7:
        raise UserError("seven is out of order")
    return number * number


def fill_shared_memory(_: int) -> int:
    # As the loader hands on what a worker raised; a real one with a full /dev/shm needs a small one.
    raise RuntimeError("Caught RuntimeError in DataLoader worker process 0. unable to allocate shared memory(shm)")


def whereabouts(_: int) -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_a_mistake_where_it_is_due(workers: int) -> None:
    results: Iterator[int] = load(square, range(7), workers=workers)
    assert list(results) == [0, 1, 4, 9, 16, 25, 36]
    results = load(square, range(20), workers=workers)
    assert list(itertools.islice(results, 7)) == [0, 1, 4, 9, 16, 25, 36]
    with pytest.raises(UserError, match=r"^seven is out of order$"):
        next(results)


def test_shared_memory_that_is_full_is_told_in_words() -> None:
    with pytest.raises(UserError, match=r"space in /dev/shm: set data\.workers to fewer"):
        next(load(fill_shared_memory, range(3), workers=0))


def test_workers_ignore_ctrl_c_and_their_death_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    # The loader looks for dead workers only every 5 s.
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    results = load(whereabouts, itertools.count(), workers=1)
    pid, threads = next(results)
    assert pid != os.getpid()
    assert threads == 1
    os.kill(pid, signal.SIGINT)
    assert [next(results)[0] for _ in range(10)] == [pid] * 10
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"process that prepares images died.*data\.workers"):
        for _ in results:
            pass


def test_closing_ends_the_workers() -> None:
    results = load(whereabouts, itertools.count(), workers=2)
    workers = {next(results)[0] for _ in range(4)}
    assert len(workers) == 2
    results.close()  # type: ignore[attr-defined]
    wait_until_gone(workers)


def test_the_server_can_be_started_ahead() -> None:
    def server() -> int:
        return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]

    warm_up()
    started = server()
    assert is_running(started)
    assert list(load(square, range(3), workers=1)) == [0, 1, 4]
    warm_up()
    assert server() == started


@pytest.mark.slow
def test_workers_end_when_the_main_process_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import itertools, os\nfrom msf_faiss.data.workers import load\n"
        "def whereabouts(item): return os.getpid()\n"
        "if __name__ == '__main__':\n    results = load(whereabouts, itertools.count(), workers=2)\n"
        "    print(next(results), next(results), flush=True)\n    input()\n"
    )
    with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        workers = [int(pid) for pid in main.stdout.readline().split()]
        assert len(set(workers)) == 2
        main.kill()
    wait_until_gone(workers)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    assert list(load(square, range(3), workers=0)) == [0, 1, 4]
    assert torch.equal(torch.get_rng_state(), before)
