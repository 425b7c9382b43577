"""Where the wall time of training goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Clock:
    """Where the wall time goes: named parts of it, and all of it, since the last reading.

    On CUDA, work is queued rather than done when a call returns, so a part that computes there is timed by events; they
    are read where a report waits for the device anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self.tracing = False  # the parts are to be named in the trace of torch's profiler
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

    @contextmanager
    def on_host(self, part: str) -> Iterator[None]:
        """Time the host's waiting."""
        start = time.perf_counter()
        with self._named(part):
            yield
        self._add(part, time.perf_counter() - start)

    @contextmanager
    def on_device(self, part: str, device: torch.device | None = None) -> Iterator[None]:
        """Time the device's computing on its current stream, or that of another `device`."""
        if (device or self._device).type != "cuda":
            with self.on_host(part):
                yield
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        with self._named(part):
            yield
        after.record()
        self._events.append((part, before, after))

    def settle(self) -> None:
        """Wait for the device, so that whoever reads from it next does not pay for what was queued before."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last reading, and those of each part. On CUDA the device must have been waited for."""
        for part, before, after in self._events:
            self._add(part, before.elapsed_time(after) / 1000)
        now = time.perf_counter()
        total, parts = now - self._start, self._seconds
        self._start, self._seconds = now, {}
        self._events.clear()
        return total, parts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens meanwhile, as an evaluation between two steps."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def _named(self, part: str) -> AbstractContextManager[object]:
        return torch.profiler.record_function(part) if self.tracing else nullcontext()

    def _add(self, part: str, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds
