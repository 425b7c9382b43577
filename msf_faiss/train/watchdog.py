"""Ends a run whose step has hung: a collective whose peer is gone, a disk that does not answer, a deadlock."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from msf_faiss.errors import EXIT_RESTART


class Watchdog:
    """Calls `on_hang` if nothing is heard for `seconds`; without `seconds` it watches nothing.

    Args:
        seconds: the longest time between two calls of `heard`.
        on_hang: by default says so, shows where every thread stands, and ends the process with the exit code that asks
            for a new start. Nothing gentler gets a thread out of a hung call.
    """

    def __init__(self, seconds: float | None, on_hang: Callable[[float], None] | None = None) -> None:
        self._seconds = seconds
        self._on_hang = on_hang or _end
        self._heard = time.monotonic()
        self._paused = 0
        self._over = threading.Event()

    def heard(self) -> None:
        """A step is done."""
        self._heard = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until this is left."""
        if self._seconds is None:
            yield
            return
        thread = threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True)
        self.heard()
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is no step, as an evaluation, takes as long as it takes."""
        self._paused += 1
        try:
            yield
        finally:
            self.heard()
            self._paused -= 1

    def _watch(self, seconds: float) -> None:
        while not self._over.wait(min(seconds / 4, 1.0)):
            if not self._paused and time.monotonic() - self._heard > seconds:
                self._on_hang(seconds)
                return


def _end(seconds: float) -> None:
    print(
        f"error: no step was finished for {seconds:g} seconds (train.hang_seconds); every thread stands here:",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(all_threads=True)
    print(
        "the run ends; start the same command again to continue from its last checkpoint", file=sys.stderr, flush=True
    )
    os._exit(EXIT_RESTART)
