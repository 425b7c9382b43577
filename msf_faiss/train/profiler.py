"""Where the time of a run's steps goes: some are timed part by part, and after them a few traced by torch's profiler.

Traced steps are slower, so what is timed is not traced.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from msf_faiss.errors import UserError
from msf_faiss.train.clock import Clock

FOLDER = "profile"

WARM_UP = 5
"""Steps before those that are timed: kernels are chosen, memory is allocated, workers begin."""
TRACED = 3
"""Steps after those that are timed."""


class Profiler:
    """Follows a run step by step.

    Args:
        steps: to be timed.
        first_step: the number of finished steps when the run begins.
        last_step: and when it ends.
        clock: of the run; whoever reads it tells `add`.

    Raises:
        UserError: if the run is too short.
    """

    def __init__(self, steps: int, *, first_step: int, last_step: int, clock: Clock) -> None:
        needed = WARM_UP + steps + TRACED
        if last_step - first_step < needed:
            raise UserError(
                f"--profile {steps} needs {needed} steps ({WARM_UP} before and {TRACED} after those that are timed), "
                f"and the run has {last_step - first_step} to go; raise train.epochs or train.max_steps, or profile "
                "fewer"
            )
        self.steps = steps
        self.begins = first_step + WARM_UP
        self.ends = self.begins + steps
        self.traced = self.ends + TRACED
        self._clock = clock
        self._seconds: float = 0.0
        self._parts: dict[str, float] = {}
        self._trace: torch.profiler.profile | None = None

    def is_due(self, step: int) -> bool:
        """Whether the clock is to be read after so many finished steps."""
        return step in (self.begins, self.ends)

    def add(self, step: int, seconds: float, parts: Mapping[str, float]) -> None:
        """Take in what the clock was read to say after `step`."""
        if not self.begins < step <= self.ends:
            return
        self._seconds += seconds
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + part

    @property
    def seconds(self) -> float:
        """Wall time of a step."""
        return self._seconds / self.steps

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of a step by part; parts that go on beside one another count in full."""
        return {name: part / self.steps for name, part in self._parts.items()}

    def trace(self, step: int) -> bool:
        """Begin or end the trace if it is time for that; true if it is complete now."""
        if step == self.ends:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes on itself would get between ours
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
        """Write the trace into a run's directory, as chrome://tracing and Perfetto read it.

        Raises:
            UserError: if it cannot be written.
        """
        assert self._trace is not None, "the trace is complete"
        path = run_dir / FOLDER / f"step-{self.traced:08d}.json.gz"
        try:
            path.parent.mkdir(exist_ok=True)
            self._trace.export_chrome_trace(str(path))
        except OSError as error:
            raise UserError(
                f"{path}: cannot write the profile: {error.strerror}; make room, or leave --profile out"
            ) from error
        return path
