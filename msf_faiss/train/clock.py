"""Measures where the wall time of training goes."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Clock:
    """Wall time since the last reading, in total and of each named part.

    CUDA calls return before their work is done, so parts that compute there are timed by events. These are read where a
    progress event waits for the device anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self.tracing = False  # name the parts in the trace of torch's profiler
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

    @contextmanager
    def on_host(self, part: str) -> Iterator[None]:
        """Time `part` on the host."""
        start = time.perf_counter()
        with self._named(part):
            yield
        self._add(part, time.perf_counter() - start)

    @contextmanager
    def on_device(self, part: str, device: torch.device | None = None) -> Iterator[None]:
        """Time `part` on the current stream of `device`, by default the clock's own device."""
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
        """Wait for the device, so that the next transfer from it is not charged for work queued earlier."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last reading, in total and by part. On CUDA, call `settle` first."""
        for part, before, after in self._events:
            self._add(part, before.elapsed_time(after) / 1000)
        now = time.perf_counter()
        total, parts = now - self._start, self._seconds
        self._start, self._seconds = now, {}
        self._events.clear()
        return total, parts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the context from the total, as for an evaluation."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def _named(self, part: str) -> AbstractContextManager[object]:
        return torch.profiler.record_function(part) if self.tracing else nullcontext()

    def _add(self, part: str, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds
