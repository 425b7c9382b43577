"""The curves in a run's metrics.jsonl, and fewer points that look the same.

Shapes: n points of a curve, in the order of their steps.
"""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from msf_faiss.run.metrics_file import check_header

MOST_POINTS = 1500  # of a curve on the page: more than its pixels
_SMOOTH_POINTS = 400
SMOOTH_SHARE = 0.02  # of a curve's points, over which a smoothed one is the mean
_LEAST_TO_SMOOTH = 50  # points; the mean of a few is another curve, not a smoother one
_LARGEST_STEP = 2**53  # what a float, and JavaScript, still counts
_LARGEST = 1e300  # sums and ranges of such values overflow; it counts as infinite


@dataclass(frozen=True, slots=True)
class Curve:
    """One reading over the steps. NaN: the run reported it and had nothing to tell, or no finite number."""

    steps: NDArray[np.int64]  # [n] ascending, each once
    values: NDArray[np.float64]  # [n]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that happened at a step, to be seen in every curve."""

    step: int
    epoch: float | None
    kind: Literal["collapse", "bank", "loss"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """All that a metrics.jsonl holds."""

    curves: Mapping[str, Curve]  # by the name in the file, in the order of its first line
    marks: tuple[Mark, ...]
    skipped: int  # lines that are no record: cut short by a kill, or being written

    def last(self, name: str) -> float | None:
        """The last reading; None: there is none, or it is no number."""
        curve = self.curves.get(name)
        return None if curve is None or math.isnan(curve.values[-1]) else float(curve.values[-1])


def read_metrics(path: Path) -> Metrics:
    """Every number and truth value of a metrics.jsonl as a curve; nothing if there is no such file.

    A line that is cut short is skipped. Where a step is there twice, its last line counts.

    Raises:
        UserError: if the file has another format version.
        OSError: if it cannot be read.
    """
    points: dict[str, tuple[array[int], array[float]]] = {}
    marks: dict[tuple[str, int], Mark] = {}
    skipped = 0
    for record in _records(path):
        if record is None:
            skipped += 1
            continue
        step = record["step"]
        for mark in _marks(record):
            marks.setdefault((mark.kind, mark.step if mark.kind != "loss" else 0), mark)
        for name, value in record.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                steps, values = points.setdefault(name, (array("q"), array("d")))
                steps.append(step)
                values.append(_finite(value))
    curves = {name: _in_order(np.array(steps), np.array(values)) for name, (steps, values) in points.items()}
    told = {name: curve for name, curve in curves.items() if not np.isnan(curve.values).all()}
    return Metrics(curves=told, marks=tuple(sorted(marks.values(), key=lambda mark: mark.step)), skipped=skipped)


def thin(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """At most `most` points of a curve. Of each stretch the lowest and the highest stay, and a gap, so that no spike is
    lost; the first and the last stay too.
    """
    count = len(curve.values)
    if count <= most:
        return curve
    kept = {0, count - 1}
    edges = np.linspace(0, count, (most - 2) // 3 + 1).astype(int)
    for start, stop in itertools.pairwise(edges.tolist()):
        part = curve.values[start:stop]
        gaps = np.isnan(part)
        if gaps.any():
            kept.add(start + int(gaps.argmax()))
        if not gaps.all():
            kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
    places = np.array(sorted(kept))
    return Curve(curve.steps[places], curve.values[places])


def smooth(curve: Curve) -> Curve | None:
    """The running mean over `SMOOTH_SHARE` of the points, at up to 400 of them; None for a curve of few points."""
    count = len(curve.values)
    if count < _LEAST_TO_SMOOTH:
        return None
    half = max(2, round(count * SMOOTH_SHARE / 2))
    places = np.unique(np.linspace(0, count - 1, _SMOOTH_POINTS).round().astype(int))
    values = np.array([_mean(curve.values[max(0, place - half) : place + half + 1]) for place in places])
    values[np.isnan(curve.values[places])] = math.nan
    return Curve(curve.steps[places], values)


def _mean(values: NDArray[np.float64]) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _records(path: Path) -> Iterator[dict[str, Any] | None]:
    """The lines of the file; None for one that is no record."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        header = file.readline()
        if not header.endswith(b"\n"):  # empty, or being written
            return
        check_header(path, header)
        for line in file:
            try:
                record = json.loads(line)
                step = record["step"]
                whole = isinstance(step, int) and 0 <= step <= _LARGEST_STEP
            except (ValueError, KeyError, TypeError, RecursionError):
                whole = False
            yield record if whole else None


def _finite(value: float | None) -> float:
    try:
        number = math.nan if value is None else float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.nan
    return number if abs(number) < _LARGEST else math.nan


def _marks(record: Mapping[str, Any]) -> Iterator[Mark]:
    epoch: Any = record.get("epoch")
    known = isinstance(epoch, int | float) and math.isfinite(epoch)
    at: dict[str, Any] = {"step": record["step"], "epoch": float(epoch) if known else None}
    collapse = record.get("collapse")
    if isinstance(collapse, dict):
        since, std, rank = (collapse.get(name) for name in ("since", "embedding_std", "effective_rank"))
        text = "the embeddings are collapsing"
        if isinstance(since, int):
            text += f" since step {since:,}"
        if isinstance(std, float) and isinstance(rank, float):
            text += f" (deviation {std:.2g} of 1, effective rank {rank:.3g})"
        yield Mark(**at, kind="collapse", text=text)
    if "bank_adjusted" in record:
        yield Mark(**at, kind="bank", text=f"bank: {record['bank_adjusted']}")
    loss = record.get("loss")
    if isinstance(loss, float) and not math.isfinite(loss):
        yield Mark(**at, kind="loss", text="the first loss that is no finite number")


def _in_order(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Curve:
    if len(steps) > 1 and not (np.diff(steps) > 0).all():
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        last = np.append(np.diff(steps) > 0, True)
        steps, values = steps[last], values[last]
    return Curve(steps, values)
