"""Worker processes: how many to start, and a loader that maps a function over items in them, in order.

Workers come from a fork server. A plain fork may hang or crash once OpenMP, CUDA or another thread has run, and a
spawned process takes seconds to import torch; the server imports it once and forks before any of that has started.
"""

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

from msf_faiss.config import Config
from msf_faiss.data.source import Source
from msf_faiss.device import CPU
from msf_faiss.errors import UserError
from msf_faiss.threads import available_cores

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_MOST_WORKERS = 16
_GPU_VIEW_SIZE = 96  # pixels; workers prepare views at least this large for a GPU even if images are in memory
_PREFETCH = 2  # items that each worker prepares ahead
_PRELOADED = ["msf_faiss.data.decoded_cache", "msf_faiss.data.eval_batches", "msf_faiss.data.train_batches"]


def worker_count(source: Source, config: Config, device: torch.device = CPU, *, processes: int = 1) -> int:
    """Number of workers that prepare `source` for `device`; each of `processes` on this host starts as many."""
    if config.data.workers != "auto":
        return config.data.workers
    # For decoded images, sending a view to another process costs as much as making it: not worthwhile on a CPU. A GPU
    # is kept waiting by views made in the main process, but not by small ones.
    if source.in_memory and not (device.type == "cuda" and config.views.size >= _GPU_VIEW_SIZE):
        return 0
    return max(1, min(available_cores() // processes, _MOST_WORKERS))


def load(
    work: Callable[[_Item], _Result], items: Iterable[_Item], *, workers: int, pin_memory: bool = False
) -> Generator[_Result, None, None]:
    """Yield `work(item)` for each of `items`, in order; computed in `workers` processes, or in this one if 0.

    `work` must be picklable if there are workers. Closing the generator ends them. Global random states are neither
    read nor advanced.

    Raises:
        UserError: if `work` raises one, or a worker dies.
    """
    with warnings.catch_warnings(), _blocked_signals():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
        results = iter(_loader(work, items, workers, pin_memory))
    try:
        while True:
            try:
                result = next(results)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # A worker killed while it sends a result breaks the pipe before the loader notices its death.
                broken = workers > 0 and isinstance(error, (ConnectionError, FileNotFoundError, EOFError))
                died = broken or str(error).startswith("DataLoader worker")
                full = "unable to allocate shared memory" in str(error)  # raised in a worker that lives on
                if not full and ("Caught " in str(error) or not died):
                    raise
                raise UserError(
                    f"a worker process died ({error}), often because memory or /dev/shm is full;"
                    " set data.workers to fewer, or to 0"
                ) from error
            if isinstance(result, UserError):
                raise result
            yield result
    finally:
        del results  # ends the workers


def warm_up() -> None:
    """Start the fork server, which imports torch in the background; else the first batch waits seconds for it."""
    _context()
    with _blocked_signals():
        forkserver.ensure_running()


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Keep SIGTERM and SIGUSR1, which a scheduler may send to every process, from the processes started meanwhile.

    The fork server and the workers inherit the mask and block both signals for good; only the main process handles
    them.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    blocked = {signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    resource_tracker.ensure_running()  # must inherit SIGUSR1 blocked too; unblocks SIGTERM as it starts
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _loader(
    work: Callable[[_Item], _Result], items: Iterable[_Item], workers: int, pin_memory: bool
) -> DataLoader[Any]:
    return DataLoader(
        _Work(work),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker if workers else None,
        multiprocessing_context=_context() if workers else None,
        prefetch_factor=_PREFETCH if workers else None,
        generator=torch.Generator(),
    )


class _Work(Dataset[Any], Generic[_Item, _Result]):
    """Poses as a data set to the DataLoader: indexing it with an item does that item's work."""

    def __init__(self, work: Callable[[_Item], _Result]) -> None:
        self._work = work

    def __getitem__(self, item: _Item) -> _Result | UserError:
        try:
            return self._work(item)
        except UserError as error:  # returned, since the DataLoader would wrap a raised one in a traceback
            return error


def _identity(result: _Result) -> _Result:
    return result


def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _start_worker(index: int) -> None:
    """Ignore Ctrl-C, since the main process ends the workers; but exit if the main process is killed.

    The DataLoader's own watch is on the parent, here the fork server, which lives as long as any worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_main_process, daemon=True).start()


def _exit_with_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(1)
