from __future__ import annotations

import importlib
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
from fake_source import FakeSource, config
from torch.utils.data import dataloader

from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.data.workers import _PRELOADED, load, warm_up, worker_count
from msf_faiss.errors import UserError


def square(number: int) -> int:
    if number == 7:
        raise UserError("seven is out of order")
    return number * number


def fill_shared_memory(_: int) -> int:
    # The error as the DataLoader forwards it from a worker; provoking it needs a small /dev/shm.
    raise RuntimeError("Caught RuntimeError in DataLoader worker process 0. unable to allocate shared memory(shm)")


def process_and_threads(_: int) -> tuple[int, int]:
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


def test_worker_count() -> None:
    memory = MemorySource(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), title="blank")
    assert worker_count(memory, config(workers="auto")) == 0
    assert 1 <= worker_count(FakeSource(4), config(workers="auto")) <= 16
    assert worker_count(memory, config(workers=3)) == 3
    assert worker_count(FakeSource(4), config(workers="auto"), processes=1000) == 1


def test_preloaded_modules_exist() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)  # the fork server ignores a wrong name


@pytest.mark.parametrize("workers", [0, 2])
def test_load_yields_results_in_order_and_raises_errors_in_place(workers: int) -> None:
    results: Iterator[int] = load(square, range(7), workers=workers)
    assert list(results) == [0, 1, 4, 9, 16, 25, 36]
    results = load(square, range(20), workers=workers)
    assert list(itertools.islice(results, 7)) == [0, 1, 4, 9, 16, 25, 36]
    with pytest.raises(UserError, match=r"^seven is out of order$"):
        next(results)


def test_full_shared_memory_is_explained() -> None:
    with pytest.raises(UserError, match=r"/dev/shm is full; set data\.workers to fewer"):
        next(load(fill_shared_memory, range(3), workers=0))


def test_workers_ignore_ctrl_c_and_their_death_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    # By default the DataLoader looks for dead workers every 5 s only.
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    results = load(process_and_threads, itertools.count(), workers=1)
    pid, threads = next(results)
    assert pid != os.getpid()
    assert threads == 1
    os.kill(pid, signal.SIGINT)
    assert [next(results)[0] for _ in range(10)] == [pid] * 10
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a worker process died.*data\.workers"):
        for _ in results:
            pass


def test_closing_the_generator_ends_the_workers() -> None:
    results = load(process_and_threads, itertools.count(), workers=2)
    workers = {next(results)[0] for _ in range(4)}
    assert len(workers) == 2
    results.close()  # type: ignore[attr-defined]
    wait_until_gone(workers)


def test_warm_up_starts_the_fork_server() -> None:
    def server() -> int:
        return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]

    warm_up()
    started = server()
    assert is_running(started)
    assert list(load(square, range(3), workers=1)) == [0, 1, 4]
    warm_up()
    assert server() == started


@pytest.mark.slow
def test_workers_exit_when_the_main_process_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import itertools, os\nfrom msf_faiss.data.workers import load\n"
        "def pid(item): return os.getpid()\n"
        "if __name__ == '__main__':\n    results = load(pid, itertools.count(), workers=2)\n"
        "    print(next(results), next(results), flush=True)\n    input()\n"
    )
    with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        workers = [int(pid) for pid in main.stdout.readline().split()]
        assert len(set(workers)) == 2
        main.kill()
    wait_until_gone(workers)


def test_load_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    assert list(load(square, range(3), workers=0)) == [0, 1, 4]
    assert torch.equal(torch.get_rng_state(), before)
