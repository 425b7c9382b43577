"""Times the parts of some steps, then traces a few more with torch's profiler.

Tracing slows a step down, so traced steps are not timed.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from msf_faiss.errors import UserError
from msf_faiss.run.directory import PROFILE
from msf_faiss.train.clock import Clock

_WARM_UP = 5
"""Untimed steps before the timed ones: kernels are selected, memory is allocated, workers start."""
_TRACED = 3
"""Traced steps after the timed ones."""


class Profiler:
    """Profiles the first steps of a run.

    Args:
        steps: number of steps to time, of those between `first_step` and `last_step`.
        clock: of the run; pass its readings to `add`.

    Raises:
        UserError: if the run is too short.
    """

    def __init__(self, steps: int, *, first_step: int, last_step: int, clock: Clock) -> None:
        needed = _WARM_UP + steps + _TRACED
        if last_step - first_step < needed:
            raise UserError(
                f"--profile {steps} needs {needed} steps ({_WARM_UP} to warm up, {steps} to time, {_TRACED} to trace), "
                f"but the run has only {last_step - first_step} left. Raise train.epochs or train.max_steps, or lower "
                "--profile"
            )
        self.steps = steps
        self.begins = first_step + _WARM_UP
        self.ends = self.begins + steps
        self.traced = self.ends + _TRACED
        self._clock = clock
        self._seconds: float = 0.0
        self._parts: dict[str, float] = {}
        self._trace: torch.profiler.profile | None = None

    def is_due(self, step: int) -> bool:
        """Whether the clock must be read after `step`."""
        return step in (self.begins, self.ends)

    def add(self, step: int, seconds: float, parts: Mapping[str, float]) -> None:
        """Add what the clock measured up to `step`."""
        if not self.begins < step <= self.ends:
            return
        self._seconds += seconds
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + part

    @property
    def seconds(self) -> float:
        """Wall time per step."""
        return self._seconds / self.steps

    @property
    def parts(self) -> dict[str, float]:
        """Seconds per step of each part; overlapping parts count in full."""
        return {name: part / self.steps for name, part in self._parts.items()}

    def trace(self, step: int) -> bool:
        """Start or stop the trace if due after `step`; returns True when the trace is complete."""
        if step == self.ends:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silence its own log
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=kinds)
            self._clock.tracing = True
            self._trace.start()
        if step == self.traced and self._trace is not None:
            self._trace.stop()
            self._clock.tracing = False
            return True
        return False

    def write_trace(self, run_dir: Path) -> Path:
        """Write the trace into a run directory, in the format of chrome://tracing and Perfetto.

        Raises:
            UserError: if it cannot be written.
        """
        assert self._trace is not None, "the trace is complete"
        path = run_dir / PROFILE / f"step-{self.traced:08d}.json.gz"
        try:
            path.parent.mkdir(exist_ok=True)
            self._trace.export_chrome_trace(str(path))
        except OSError as error:
            raise UserError(
                f"{path}: cannot write the profile: {error.strerror}. Make room, or omit --profile"
            ) from error
        return path
