"""Charts from curves: scales with round ticks, and SVG paths.

A plot is WIDTH by HEIGHT units. The page stretches it to its size on the screen, but not its lines and text.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from msf_faiss.report.metrics import Curve, Metrics, smooth, thin

WIDTH, HEIGHT = 1000, 400
_DOT_SPACING = 25  # units; curves whose points are at least this far apart on average have dots
_TINY = 1e-290  # smaller values count as zero, since floats cannot resolve a scale for them
_MAX_MARKS = 60  # lines in a plot; more would merge into a block

Format = Literal["number", "percent", "count", "ms"]


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """How a metric is described and plotted."""

    title: str
    description: str = ""
    format: Format = "number"
    log: bool = False  # offer a logarithmic scale
    noisy: bool = True  # offer smoothing


_GROUPS: dict[str, dict[str, MetricInfo]] = {
    "Learning": {
        "loss": MetricInfo("Loss", "mean squared distance between query and neighbours", log=True),
        "purity": MetricInfo("Purity", "share of neighbours with the query’s label", "percent"),
        "knn_accuracy": MetricInfo("kNN accuracy", "frozen features", "percent", noisy=False),
    },
    "Embeddings": {
        "embedding_std": MetricInfo("Embedding std", "1: evenly spread, 0: collapsed"),
        "effective_rank": MetricInfo("Effective rank", "of the newest embeddings"),
        "hubness": MetricInfo("Hubness", "share of queries retrieving one of the top ten entries", "percent"),
    },
    "Bank": {
        "recall_at_k": MetricInfo("Recall@k", "of the approximate search, at the last check", "percent"),
        "neighbor_age_mean": MetricInfo("Neighbour age", "mean, in entries pushed since then", "count"),
        "neighbor_age_p95": MetricInfo("Neighbour age, p95", "in entries pushed since then", "count"),
        "bank_fill_ratio": MetricInfo("Fill ratio", "entries divided by capacity", "percent", noisy=False),
    },
    "Speed": {
        "images_per_second": MetricInfo("Throughput", "images per second", "count"),
        "model_time_ratio": MetricInfo("Model time", "forward, backward, optimizer; share of wall time", "percent"),
        "data_time_ratio": MetricInfo("Data time", "waiting for images, making views; share of wall time", "percent"),
        "bank_time_ratio": MetricInfo("Bank time", "push, search, mean and checks; share of wall time", "percent"),
        "push_ms": MetricInfo("Push time", "per step", "ms"),
        "search_ms": MetricInfo("Search time", "per step", "ms"),
    },
    "Schedule": {
        "learning_rate": MetricInfo("Learning rate", noisy=False),
        "ema_momentum": MetricInfo("EMA momentum", noisy=False),
    },
}
_NOT_PLOTTED = {
    *("epoch", "eta_seconds", "collapsing_since"),
    *("knn_k", "knn_seconds", "knn_leave_one_out", "knn_images", "knn_untrained", "knn_best", "knn_best_step"),
    "knn_warning",
}
_PLOTTED_IF_POSITIVE = {"unreadable_images": MetricInfo("Unreadable images", "skipped so far", "count", noisy=False)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The vertical axis, from `low` at the bottom to `high` at the top."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def y(self, value: float) -> float | None:
        """Return the distance from the top in units, or None for NaN and for values that a log scale cannot show."""
        if math.isnan(value) or (self.log and value < self.low):
            return None
        low, high, value = (
            (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return HEIGHT * (1 - (value - low) / (high - low))


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """A curve as the `d` attributes of SVG paths."""

    line: str
    dots: str  # points without a neighbour to connect to, or all points if they are few
    smooth: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Series:
    """The curve of one run in a chart."""

    run: int
    curve: Curve  # thinned
    linear: Path
    log: Path | None
    last: str  # last value, formatted
    description: str  # of the curve, for screen readers


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One metric of all runs that recorded it."""

    name: str
    info: MetricInfo
    linear: Scale
    log: Scale | None
    series: tuple[_Series, ...]


def make_charts(runs: Sequence[Metrics]) -> dict[str, list[Chart]]:
    """Return charts by group, in reading order. Unknown metrics come last: bank_* in "Bank", others in "More"."""
    names = dict.fromkeys(name for run in runs for name in run.curves if name not in _NOT_PLOTTED)
    groups = {group: [name for name in infos if name in names] for group, infos in _GROUPS.items()}
    for name in names:
        if name in _PLOTTED_IF_POSITIVE:
            if any((run.last(name) or 0) > 0 for run in runs):
                groups["Speed"].append(name)
        elif not any(name in known for known in groups.values()):
            groups.setdefault("Bank" if name.startswith("bank_") else "More", []).append(name)
    return {group: [_make_chart(name, runs) for name in members] for group, members in groups.items() if members}


def metric_info(name: str, runs: Sequence[Metrics]) -> MetricInfo:
    """Return how the metric `name` of these runs is described and plotted."""
    known = {name: info for infos in _GROUPS.values() for name, info in infos.items()} | _PLOTTED_IF_POSITIVE
    if name not in known:
        title = name.removeprefix("bank_").replace("_", " ").capitalize()
        return MetricInfo(title, format="percent" if name.endswith("_ratio") else "number")
    return _knn_info(known[name], runs) if name == "knn_accuracy" else known[name]


def last_step(runs: Sequence[Metrics]) -> int:
    """Return the last step of all runs, at least 1: the right end of all charts."""
    return max([1, *(int(curve.steps[-1]) for run in runs for curve in run.curves.values())])


def format_value(value: float | None, format: Format = "number") -> str:
    """Format a value; report.js does the same."""
    if value is None or math.isnan(value):
        return "–"
    match format:
        case "percent":
            return f"{100 * value:.1f}%"
        case "count":
            return f"{value:,.0f}"
        case "ms":
            return f"{_significant(value, 3)} ms"
        case _:
            return _significant(value, 4)


def _significant(value: float, digits: int) -> str:
    """Round to `digits` significant digits, but keep all integer digits."""
    if abs(value) >= 10**digits:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.2e}"
    return re.sub(r"e-0*", "e-", f"{value:.{digits}g}")


def format_tick(value: float, format: Format) -> str:
    """Format a round number at an axis."""
    if format == "percent":
        return f"{100 * value:.10g}%"
    if 1e6 <= abs(value) < 1e12:
        return f"{value / 1e6:,.10g} M"
    return f"{value:,.10g}" if 1e-4 <= abs(value) < 1e12 or value == 0 else f"{value:.3g}"


def round_ticks(low: float, high: float, count: int = 4) -> tuple[float, ...]:
    """Return about `count` round numbers; the first is at most `low`, the last at least `high`."""
    if high - low < _TINY:
        low, high = (low, 0.0) if low < -_TINY else (0.0, high if high > _TINY else 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough * (1 - 1e-9)), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(float(f"{place * step:.12g}") for place in range(first, last + 1))


def step_ticks(last: int) -> list[int]:
    """Return round steps from 0 to at most `last`."""
    return [round(tick) for tick in round_ticks(0, last) if tick <= last and tick == round(tick)]


def mark_positions(steps: Sequence[int], last: int) -> list[int]:
    """Return the x positions of marks at `steps` without duplicates, at most 60."""
    return list(dict.fromkeys(round(WIDTH * step / last) for step in steps))[:_MAX_MARKS]


def _make_chart(name: str, runs: Sequence[Metrics]) -> Chart:
    info, last = metric_info(name, runs), last_step(runs)
    curves = {number: run.curves[name] for number, run in enumerate(runs) if name in run.curves}
    thinned = {number: thin(curve) for number, curve in curves.items()}
    values = [value for curve in thinned.values() for value in curve.values.tolist() if not math.isnan(value)]
    linear = _linear_scale(min(values), max(values), info)
    positive = [value for value in values if value > _TINY]
    log = _log_scale(min(positive), max(positive)) if info.log and positive else None
    series = []
    for number, curve in curves.items():
        smoothed = smooth(curve) if info.noisy else None
        series.append(
            _Series(
                run=number,
                curve=thinned[number],
                linear=_path(thinned[number], smoothed, linear, last),
                log=None if log is None else _path(thinned[number], smoothed, log, last),
                last=format_value(runs[number].last(name), info.format),
                description=_describe(curve, info),
            )
        )
    return Chart(name=name, info=info, linear=linear, log=log, series=tuple(series))


def _knn_info(info: MetricInfo, runs: Sequence[Metrics]) -> MetricInfo:
    """Add k and the evaluated images, if they are the same in all runs."""
    k, leave_one_out = (
        {run.last(name) for run in runs if "knn_accuracy" in run.curves} for name in ("knn_k", "knn_leave_one_out")
    )
    images = ""
    if len(leave_one_out) == 1 and None not in leave_one_out:
        images = ", leave-one-out on the training images" if leave_one_out == {1.0} else ", on held-out images"
    title = f"{number:.0f}-NN accuracy" if len(k) == 1 and (number := next(iter(k))) else info.title
    return replace(info, title=title, description=info.description + images)


def _linear_scale(low: float, high: float, info: MetricInfo) -> Scale:
    if 0 <= low < high * (0.9 if info.format == "percent" else 0.5):
        low = 0.0
    ticks = round_ticks(low, high)
    if info.format == "percent" and high <= 1:
        ticks = tuple(tick for tick in ticks if tick <= 1)
    return Scale(low=min(ticks[0], low), high=max(ticks[-1], high), log=False, ticks=ticks)


def _log_scale(low: float, high: float) -> Scale:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, -(-(last - first) // 4))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    below = max((tick for tick in ticks if tick <= low), default=10.0**first)
    above = min((tick for tick in ticks if tick >= high), default=10.0**last)
    if below == above:
        below, above = below / 2, above * 2
    return Scale(low=below, high=above, log=True, ticks=tuple(tick for tick in ticks if below <= tick <= above))


def _path(curve: Curve, smoothed: Curve | None, scale: Scale, last: int) -> Path:
    line, dots = _line_and_dots(curve, scale, last)
    return Path(line=line, dots=dots, smooth="" if smoothed is None else _line_and_dots(smoothed, scale, last)[0])


def _line_and_dots(curve: Curve, scale: Scale, last: int) -> tuple[str, str]:
    pieces: list[list[str]] = [[]]  # between gaps
    for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True):
        y = scale.y(value)
        if y is not None:
            pieces[-1].append(f"{_format_coordinate(WIDTH * step / last)},{_format_coordinate(y)}")
        elif pieces[-1]:
            pieces.append([])
    width = WIDTH * int(curve.steps[-1] - curve.steps[0]) / last
    all_dots = (len(curve.values) - 1) * _DOT_SPACING <= width
    dots = [point for piece in pieces for point in piece if all_dots or len(piece) == 1]
    line = "".join("M" + " ".join(piece) for piece in pieces if len(piece) > 1)
    return line, "".join(f"M{point}h0" for point in dots)


def _format_coordinate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _describe(curve: Curve, info: MetricInfo) -> str:
    """Describe a curve for screen readers."""
    known = np.flatnonzero(~np.isnan(curve.values))
    points = {
        "from": known[0],
        "to": known[-1],
        "lowest": np.nanargmin(curve.values),
        "highest": np.nanargmax(curve.values),
    }
    return ", ".join(
        f"{name} {format_value(float(curve.values[point]), info.format)} at step {curve.steps[point]:,}"
        for name, point in points.items()
    )


def chart_data(chart: Chart) -> dict[str, Any]:
    """Return what the page's script needs to show values at a step."""
    return {
        "format": chart.info.format,
        "linear": [chart.linear.low, chart.linear.high],
        "log": None if chart.log is None else [chart.log.low, chart.log.high],
        "series": [
            {
                "run": series.run,
                "steps": series.curve.steps.tolist(),
                "values": [
                    None if math.isnan(value) else float(f"{value:.5g}") for value in series.curve.values.tolist()
                ],
            }
            for series in chart.series
        ],
    }
