"""Ends a run whose step hangs: in a collective whose peer is gone, on an unresponsive disk, in a deadlock."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

from msf_faiss.errors import EXIT_RESTART


class Watchdog:
    """Ends the process if `reset` is not called for `seconds`; None disables it.

    It prints the stack of every thread and exits with the code that asks for a restart. Nothing gentler gets a thread
    out of a hung call.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._last_reset = time.monotonic()
        self._paused = 0
        self._over = threading.Event()

    def reset(self) -> None:
        """Restart the countdown."""
        self._last_reset = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch within the context."""
        if self._seconds is None:
            yield
            return
        thread = threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True)
        self.reset()
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Allow any time within the context, as for an evaluation."""
        self._paused += 1
        try:
            yield
        finally:
            self.reset()
            self._paused -= 1

    def _watch(self, seconds: float) -> None:
        while not self._over.wait(min(seconds / 4, 1.0)):
            if not self._paused and time.monotonic() - self._last_reset > seconds:
                _end(seconds)


def _end(seconds: float) -> None:
    print(
        f"error: no step finished within {seconds:g} seconds (train.hang_seconds). Stacks of all threads:",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(all_threads=True)
    print("start the same command again to resume from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(EXIT_RESTART)
