"""Work done ahead in worker processes, in order, with the mistakes it finds handed on in one piece.

Workers come from a fork server: a plain fork may hang or crash once OpenMP, CUDA or another thread has run, and a
spawned process imports torch anew (seconds); the server imports it once and forks before anything of that happened.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from msf_faiss.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # items that each worker prepares before they are asked for


def load(
    work: Callable[[Item], Result], items: Iterable[Item], *, workers: int, pin_memory: bool = False
) -> Generator[Result, None, None]:
    """`work(item)` for each of `items`, in their order; with `workers` > 0 in so many processes (`work` is pickled).

    Closing the iterator ends the processes. Global random states are neither read nor advanced.

    Raises:
        UserError: if `work` does, or a worker process dies.
    """
    with warnings.catch_warnings(), _signals_held():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
        results = iter(_loader(work, items, workers, pin_memory))
    try:
        while True:
            try:
                result = next(results)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # A worker that is killed while it hands something over breaks the pipe rather than being missed.
                broken = workers > 0 and isinstance(error, (ConnectionError, FileNotFoundError, EOFError))
                died = broken or str(error).startswith("DataLoader worker")
                full = "unable to allocate shared memory" in str(error)  # told by a worker that lives on
                if not full and ("Caught " in str(error) or not died):
                    raise
                raise UserError(
                    f"a process that prepares images died ({error}); often memory ran out, or space in /dev/shm:"
                    " set data.workers to fewer, or to 0"
                ) from error
            if isinstance(result, UserError):
                raise result
            yield result
    finally:
        del results  # ends the workers


def warm_up() -> None:
    """Start what worker processes come from, which imports torch while the caller goes on; without this the first
    batch waits for it (seconds)."""
    _context()
    with _signals_held():
        forkserver.ensure_running()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Leave SIGTERM and SIGUSR1, which a scheduler may send to every process, to the main one.

    A process inherits which signals are held; the fork server and the workers, started meanwhile, hold them for ever.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    held = {signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    resource_tracker.ensure_running()  # is to hold SIGUSR1 too, and lets go of SIGTERM while it is started
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _loader(work: Callable[[Item], Result], items: Iterable[Item], workers: int, pin_memory: bool) -> DataLoader[Any]:
    return DataLoader(
        _Work(work),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if workers else None,
        multiprocessing_context=_context() if workers else None,
        prefetch_factor=_AHEAD if workers else None,
        generator=torch.Generator(),
    )


class _Work(Dataset[Any], Generic[Item, Result]):
    """Looks like a data set to the loader: indexed by an item, it does the item's work."""

    def __init__(self, work: Callable[[Item], Result]) -> None:
        self._work = work

    def __getitem__(self, item: Item) -> Result | UserError:
        try:
            return self._work(item)
        except UserError as error:  # raised in a worker it would arrive wrapped in a traceback
            return error


def _unchanged(result: Result) -> Result:
    return result


def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["msf_faiss.data.decoded_cache"])  # and by it all that makes batches
    return context


def _start_worker(index: int) -> None:
    """Leave Ctrl-C to the main process, which ends the workers; but end with it if it is killed.

    The loader's own watch is on the parent, which here is the fork server, and that lives as long as a worker does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)
