"""Processes connected by gloo, for tests with several ranks; started once, because starting takes seconds."""

import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from msf_faiss.data.workers import warm_up
from msf_faiss.distributed.ranks import Ranks
from msf_faiss.search.faiss_setup import set_threads

_TIMEOUT = 300.0  # seconds: on a busy machine ranks take a minute to start


class RankPool:
    """Runs functions on any number of ranks; there is one set of processes for each number."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, 0
        self._members: dict[int, list[tuple[BaseProcess, Connection]]] = {}

    def run(self, size: int, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """Call `function(ranks, *arguments)` on each of `size` ranks; return the results by rank.

        Raises:
            AssertionError: if it raises on a rank, with the traceback.
        """
        if size not in self._members:
            self._start(size)
        waiting: dict[object, int] = {}
        for rank, (_, pipe) in enumerate(self._members[size]):
            pipe.send((function, arguments))
            waiting[pipe] = rank
        answers: dict[int, Any] = {}
        while waiting:
            ready = wait([pipe for _, pipe in self._members[size] if pipe in waiting], timeout=_TIMEOUT)
            if not ready:
                self._end(size)
                raise AssertionError(f"ranks {sorted(waiting.values())} of {size} hang in {function.__name__}")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    succeeded, answer = pipe.recv()
                except EOFError:
                    succeeded, answer = False, "the process died"
                if not succeeded:
                    self._end(size)  # the others may wait for this one
                    raise AssertionError(f"on rank {rank} of {size}:\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(size)]

    def close(self) -> None:
        for size in list(self._members):
            self._end(size)

    def _end(self, size: int) -> None:
        for process, pipe in self._members.pop(size):
            process.kill()
            process.join()
            pipe.close()

    def _start(self, size: int) -> None:
        warm_up()
        context = multiprocessing.get_context("forkserver")  # which has imported torch
        self._started += 1
        store = self._folder / f"store-{self._started}"
        self._members[size] = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, there, store), daemon=True)
            process.start()
            there.close()
            self._members[size].append((process, here))


def _serve(rank: int, size: int, pipe: Connection, store: Path) -> None:
    set_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    warnings.simplefilter("error")
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            pipe.send((True, function(Ranks(rank, size, local_rank=rank, local_size=size), *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
