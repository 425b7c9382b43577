"""Curves and events from a run's metrics.jsonl, and thinning and smoothing of curves.

Shapes: n points of a curve, by step.
"""

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

_MAX_POINTS = 1500  # of a curve on the page; more than it has pixels
SMOOTHING_WINDOW = 0.02  # fraction of a curve's points that each smoothed point averages
_MAX_SMOOTH_POINTS = 400
_MIN_POINTS_TO_SMOOTH = 50  # an average of few points distorts a curve rather than smooths it
_MAX_STEP = 2**53  # floats, and so JavaScript, count no further
_MAX_VALUE = 1e300  # sums and ranges of larger values overflow; they count as infinite


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric by step; NaN where it was recorded as null or was not finite."""

    steps: NDArray[np.int64]  # [n] strictly ascending
    values: NDArray[np.float64]  # [n]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """An event, marked in every chart."""

    step: int
    epoch: float | None
    kind: Literal["collapse", "bank", "loss", "knn"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The contents of a metrics.jsonl."""

    curves: Mapping[str, Curve]  # by name, in order of first appearance
    marks: tuple[_Mark, ...]
    skipped: int  # invalid lines: cut short by a kill, or still being written

    def last(self, name: str) -> float | None:
        """Return the last value, or None if there is none or it is not finite."""
        curve = self.curves.get(name)
        return None if curve is None or math.isnan(curve.values[-1]) else float(curve.values[-1])


def read_metrics(path: Path) -> Metrics:
    """Read every numeric or boolean field as a curve. Without a file there are no curves.

    Invalid lines are skipped. If a step appears twice, its last line counts.

    Raises:
        UserError: if the file has another format version.
        OSError: if it cannot be read.
    """
    points: dict[str, tuple[array[int], array[float]]] = {}
    marks: dict[tuple[str, int], _Mark] = {}
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
    curves = {name: _sorted_curve(np.array(steps), np.array(values)) for name, (steps, values) in points.items()}
    known = {name: curve for name, curve in curves.items() if not np.isnan(curve.values).all()}
    return Metrics(curves=known, marks=tuple(sorted(marks.values(), key=lambda mark: mark.step)), skipped=skipped)


def thin(curve: Curve, max_points: int = _MAX_POINTS) -> Curve:
    """Return at most `max_points` points of a curve.

    It keeps the first and last point, and of each interval the lowest, highest and first missing value, so that no
    spike is lost.
    """
    count = len(curve.values)
    if count <= max_points:
        return curve
    kept = {0, count - 1}
    edges = np.linspace(0, count, (max_points - 2) // 3 + 1).astype(int)
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
    """Return the running mean over `SMOOTHING_WINDOW` at up to 400 points, or None for a curve of fewer than 50."""
    count = len(curve.values)
    if count < _MIN_POINTS_TO_SMOOTH:
        return None
    half = max(2, round(count * SMOOTHING_WINDOW / 2))
    places = np.unique(np.linspace(0, count - 1, _MAX_SMOOTH_POINTS).round().astype(int))
    values = np.array([_mean(curve.values[max(0, place - half) : place + half + 1]) for place in places])
    values[np.isnan(curve.values[places])] = math.nan
    return Curve(curve.steps[places], values)


def _mean(values: NDArray[np.float64]) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _records(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the record of each line, or None for an invalid line."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        header = file.readline()
        if not header.endswith(b"\n"):  # empty, or still being written
            return
        check_header(path, header)
        for line in file:
            try:
                record = json.loads(line)
                valid = isinstance(record["step"], int) and 0 <= record["step"] <= _MAX_STEP
            except (ValueError, KeyError, TypeError, RecursionError):
                valid = False
            yield record if valid else None


def _finite(value: float | None) -> float:
    try:
        number = math.nan if value is None else float(value)
    except OverflowError:  # an integer with hundreds of digits
        return math.nan
    return number if abs(number) < _MAX_VALUE else math.nan


def _marks(record: Mapping[str, Any]) -> Iterator[_Mark]:
    epoch: Any = record.get("epoch")
    known = isinstance(epoch, int | float) and math.isfinite(epoch)
    at: dict[str, Any] = {"step": record["step"], "epoch": float(epoch) if known else None}
    collapse = record.get("collapse")
    if isinstance(collapse, dict):
        since, std, rank = (collapse.get(name) for name in ("since", "embedding_std", "effective_rank"))
        text = "the embeddings are collapsing"
        if isinstance(since, int):
            text = f"the embeddings have been collapsing since step {since:,}"
        if isinstance(std, float) and isinstance(rank, float):
            text += f" (std {std:.2g}, effective rank {rank:.3g})"
        yield _Mark(**at, kind="collapse", text=text)
    if isinstance(record.get("knn_warning"), str):
        yield _Mark(**at, kind="knn", text=record["knn_warning"])
    if "bank_adjusted" in record:
        yield _Mark(**at, kind="bank", text=f"bank: {record['bank_adjusted']}")
    loss = record.get("loss")
    if isinstance(loss, float) and not math.isfinite(loss):
        yield _Mark(**at, kind="loss", text="the loss is not finite")


def _sorted_curve(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Curve:
    if len(steps) > 1 and not (np.diff(steps) > 0).all():
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        last = np.append(np.diff(steps) > 0, True)
        steps, values = steps[last], values[last]
    return Curve(steps, values)
