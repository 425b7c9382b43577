"""What a run watches while it trains. Labels are read here and nowhere else in training.

Shapes: B queries, K neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.errors import UserError


class NeighborMonitor:
    """Purity and age of the neighbours, without entries of the query's own image.

    The authors count a query's own entry too, which gives their purity a floor of 1/k. A bank larger than the data set
    holds an image several times; all of these entries are left out, since their label is right by construction.

    Args:
        labels: [images] int64, -1 for an image without a label; None for an unlabelled data set.
        device: where ids and ages will be.
    """

    def __init__(self, labels: NDArray[np.int64] | None, device: torch.device) -> None:
        self._labels = None if labels is None else torch.from_numpy(labels).to(device)
        self._zero = torch.zeros(4, dtype=torch.float64, device=device)
        self._sums = self._zero.clone()  # matches, labelled pairs, ages, pairs

    def update(self, ids: Tensor, neighbor_ids: Tensor, ages: Tensor) -> None:
        """Count one batch: ids [B], ids of the neighbours [B, K], their ages [B, K]. Does not wait for the device."""
        others = neighbor_ids != ids.unsqueeze(1)  # [B, K]
        if self._labels is None:
            matches = labelled = torch.zeros_like(others)
        else:
            own, theirs = self._labels[ids].unsqueeze(1), self._labels[neighbor_ids]
            labelled = others & (own >= 0) & (theirs >= 0)
            matches = labelled & (own == theirs)
        self._sums += torch.stack([matches.sum(), labelled.sum(), (ages * others).sum(), others.sum()])

    @property
    def pending(self) -> Tensor:
        """What was counted since the last reading: [4] float64. A resumed run goes on from it."""
        return self._sums

    @pending.setter
    def pending(self, sums: Tensor) -> None:
        self._sums = sums.to(self._zero.device)

    def read(self) -> tuple[float | None, float]:
        """Purity (None if no pair could be compared) and mean age in entries since the last reading."""
        matches, labelled, ages, pairs = self._sums.tolist()
        self._sums = self._zero.clone()
        return matches / labelled if labelled else None, ages / pairs if pairs else 0.0


class LossMonitor:
    """Losses of the steps since the last reading, kept on the device until then."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []

    def update(self, loss: Tensor) -> None:
        self._losses.append(loss)

    @property
    def pending(self) -> Tensor:
        """The losses since the last reading: [n]. A resumed run goes on from them."""
        return torch.stack(self._losses) if self._losses else torch.empty(0)

    @pending.setter
    def pending(self, losses: Tensor) -> None:
        self._losses = list(losses)

    def check(self, step: int) -> list[float]:
        """The losses since the last reading, up to and with step number `step`.

        Raises:
            UserError: if one is not finite; names the first such step.
        """
        losses: list[float] = self.pending.tolist()
        for number, loss in enumerate(losses, start=step - len(losses) + 1):
            if not np.isfinite(loss):
                raise UserError(
                    f"the loss of step {number} is {loss}: training has diverged; "
                    "lower optimizer.learning_rate, or add optimizer.warmup_epochs"
                )
        return losses

    def read(self, step: int) -> float:
        """Mean loss since the last reading, checked like that."""
        losses = self.check(step)
        self._losses.clear()
        return float(np.mean(losses))


class Clock:
    """Where the wall time goes: named parts of it, and all of it, since the last reading.

    On CUDA, work is queued rather than done when a call returns, so a part that computes there is timed by events; they
    are read together with the losses, when the host waits for the device anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

    @contextmanager
    def on_host(self, part: str) -> Iterator[None]:
        """Time the host's waiting."""
        start = time.perf_counter()
        yield
        self._add(part, time.perf_counter() - start)

    @contextmanager
    def on_device(self, part: str) -> Iterator[None]:
        """Time the device's computing."""
        if not self._cuda:
            with self.on_host(part):
                yield
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        yield
        after.record()
        self._events.append((part, before, after))

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

    def _add(self, part: str, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds
