"""From curves to what is drawn: scales with round ticks, and paths of SVG.

A plot is WIDTH by HEIGHT units, whatever its size on the screen: the page stretches it, but for lines and text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from msf_faiss.report.metrics import Curve, Metrics, smooth, thin

WIDTH, HEIGHT = 1000, 400
_ROOM = 25  # units from one point to the next, on average, that leave room for dots
_TINY = 1e-290  # what is smaller counts as zero: floats have no room for a scale there
_MOST_MARKS = 60  # lines in a plot; more are a grey block

Format = Literal["number", "percent", "count", "ms"]


@dataclass(frozen=True, slots=True)
class Measure:
    """What a number in metrics.jsonl is."""

    title: str
    about: str = ""
    format: Format = "number"
    log: bool = False  # worth a logarithmic scale
    noisy: bool = True  # worth smoothing


GROUPS: dict[str, dict[str, Measure]] = {
    "Learning": {
        "loss": Measure("Loss", "2 − 2 cosine to the mean of the neighbours", log=True),
        "purity": Measure("Purity", "neighbours with the query’s label", "percent"),
        "knn_accuracy": Measure("kNN accuracy", "frozen features", "percent", noisy=False),
    },
    "Embeddings": {
        "embedding_std": Measure("Spread", "1: evenly spread, 0: all the same"),
        "effective_rank": Measure("Effective rank", "of the newest embeddings"),
        "hubness": Measure("Hubness", "queries that retrieve one of the ten most retrieved entries", "percent"),
    },
    "Bank": {
        "recall_at_k": Measure("Recall", "of the approximate search, as last checked", "percent"),
        "neighbor_age_mean": Measure("Age of the neighbours", "mean, in entries pushed since", "count"),
        "neighbor_age_p95": Measure("Age, 95th percentile", "in entries pushed since", "count"),
        "bank_fill_ratio": Measure("Fill ratio", "of the bank’s capacity", "percent", noisy=False),
    },
    "Speed": {
        "images_per_second": Measure("Images a second", "", "count"),
        "model_time_ratio": Measure("Share of the model", "forward, backward, optimizer, of the wall time", "percent"),
        "data_time_ratio": Measure("Share of the data", "waiting for them and making views", "percent"),
        "bank_time_ratio": Measure("Share of the bank", "push, search, mean and checks", "percent"),
        "push_ms": Measure("Push", "milliseconds a step", "ms"),
        "search_ms": Measure("Search", "milliseconds a step", "ms"),
    },
    "Schedule": {
        "learning_rate": Measure("Learning rate", noisy=False),
        "ema_momentum": Measure("EMA momentum", noisy=False),
    },
}
_NO_CURVES = {"epoch", "eta_seconds", "collapsing_since", "knn_k", "knn_seconds", "knn_leave_one_out"}
_ONLY_IF_ANY = {"unreadable_images": Measure("Unreadable images", "left out so far", "count", noisy=False)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Values from `low`, at the bottom, to `high`, at the top."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def y(self, value: float) -> float | None:
        """From the top, in units of the plot; None: a logarithm has no place for it."""
        if math.isnan(value) or (self.log and value < self.low):
            return None
        low, high, value = (
            (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return HEIGHT * (1 - (value - low) / (high - low))


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """Curves as the `d` of an SVG path."""

    line: str
    dots: str  # of points that have no neighbour to be joined with, or are few
    smooth: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One run's curve in a chart."""

    run: int
    curve: Curve  # thinned
    linear: Path
    log: Path | None
    last: str  # its last reading in words
    about: str  # the whole curve in words


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One reading of all runs that have it."""

    name: str
    measure: Measure
    linear: Scale
    log: Scale | None
    series: tuple[Series, ...]


def draw(runs: Sequence[Metrics]) -> dict[str, list[Chart]]:
    """Charts by group, in reading order; what no group knows comes last in "Bank" or in "More"."""
    names = dict.fromkeys(name for run in runs for name in run.curves if name not in _NO_CURVES)
    groups = {group: [name for name in measures if name in names] for group, measures in GROUPS.items()}
    for name in names:
        if name in _ONLY_IF_ANY:
            if any((run.last(name) or 0) > 0 for run in runs):
                groups["Speed"].append(name)
        elif not any(name in found for found in groups.values()):
            groups.setdefault("Bank" if name.startswith("bank_") else "More", []).append(name)
    return {
        group: [_chart(name, measure_of(name, runs), runs) for name in found]
        for group, found in groups.items()
        if found
    }


def measure_of(name: str, runs: Sequence[Metrics]) -> Measure:
    """What the number `name` is in these runs."""
    known = {name: measure for measures in GROUPS.values() for name, measure in measures.items()} | _ONLY_IF_ANY
    if name not in known:
        title = name.removeprefix("bank_").replace("_", " ").capitalize()
        return Measure(title, format="percent" if name.endswith("_share") else "number")
    return _knn(known[name], runs) if name == "knn_accuracy" else known[name]


def span(runs: Sequence[Metrics]) -> int:
    """The last step of all runs, at least 1: where every chart ends on the right."""
    return max([1, *(int(curve.steps[-1]) for run in runs for curve in run.curves.values())])


def in_words(value: float | None, format: Format = "number") -> str:
    """A reading for people; report.js has the same."""
    if value is None or math.isnan(value):
        return "–"
    match format:
        case "percent":
            return f"{100 * value:.1f}%"
        case "count":
            return f"{value:,.0f}"
        case "ms":
            return f"{_digits(value, 3)} ms"
        case _:
            return _digits(value, 4)


def _digits(value: float, digits: int) -> str:
    """So many significant digits, and all digits of a large number."""
    if abs(value) >= 10**digits:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.2e}"
    return re.sub(r"e-0*", "e-", f"{value:.{digits}g}")


def tick_in_words(value: float, format: Format) -> str:
    """A round number at an axis."""
    if format == "percent":
        return f"{100 * value:.10g}%"
    if 1e6 <= abs(value) < 1e12:
        return f"{value / 1e6:,.10g} M"
    return f"{value:,.10g}" if 1e-4 <= abs(value) < 1e12 or value == 0 else f"{value:.3g}"


def round_ticks(low: float, high: float, about: int = 4) -> tuple[float, ...]:
    """Round numbers from at or below `low` to at or above `high`, some `about` of them."""
    if high - low < _TINY:
        low, high = (low, 0.0) if low < -_TINY else (0.0, high if high > _TINY else 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough * (1 - 1e-9)), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(float(f"{place * step:.12g}") for place in range(first, last + 1))


def step_ticks(last: int) -> list[int]:
    """Round steps from 0 to at most `last`."""
    return [round(tick) for tick in round_ticks(0, last) if tick <= last and tick == round(tick)]


def mark_places(steps: Sequence[int], last_step: int) -> list[int]:
    """Where the marks at `steps` stand, each place once; the first ones of very many."""
    return list(dict.fromkeys(round(WIDTH * step / last_step) for step in steps))[:_MOST_MARKS]


def _chart(name: str, measure: Measure, runs: Sequence[Metrics]) -> Chart:
    last_step = span(runs)
    with_curve = [
        (number, thin(run.curves[name]), run.curves[name]) for number, run in enumerate(runs) if name in run.curves
    ]
    values = [value for _, curve, _ in with_curve for value in curve.values.tolist() if not math.isnan(value)]
    linear = _linear(min(values), max(values), measure)
    positive = [value for value in values if value > _TINY]
    log = _logarithmic(min(positive), max(positive)) if measure.log and positive else None
    series = []
    for number, curve, whole in with_curve:
        smoothed = smooth(whole) if measure.noisy else None
        series.append(
            Series(
                run=number,
                curve=curve,
                linear=_path(curve, smoothed, linear, last_step),
                log=None if log is None else _path(curve, smoothed, log, last_step),
                last=in_words(runs[number].last(name), measure.format),
                about=_in_words(whole, measure),
            )
        )
    return Chart(name=name, measure=measure, linear=linear, log=log, series=tuple(series))


def _knn(measure: Measure, runs: Sequence[Metrics]) -> Measure:
    """With k and the voters, where they are the same in all runs."""
    k, alone = (
        {run.last(name) for run in runs if "knn_accuracy" in run.curves} for name in ("knn_k", "knn_leave_one_out")
    )
    among = ""
    if len(alone) == 1 and None not in alone:
        among = ", leave-one-out among the training images" if alone == {1.0} else ", on held-out images"
    title = f"{number:.0f}-NN accuracy" if len(k) == 1 and (number := next(iter(k))) else measure.title
    return replace(measure, title=title, about=measure.about + among)


def _linear(low: float, high: float, measure: Measure) -> Scale:
    if 0 <= low < high * (0.9 if measure.format == "percent" else 0.5):
        low = 0.0
    ticks = round_ticks(low, high)
    if measure.format == "percent" and high <= 1:  # no tick above all that there can be
        ticks = tuple(tick for tick in ticks if tick <= 1)
    return Scale(low=min(ticks[0], low), high=max(ticks[-1], high), log=False, ticks=ticks)


def _logarithmic(low: float, high: float) -> Scale:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, -(-(last - first) // 4))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    below = max((tick for tick in ticks if tick <= low), default=10.0**first)
    above = min((tick for tick in ticks if tick >= high), default=10.0**last)
    if below == above:
        below, above = below / 2, above * 2
    return Scale(low=below, high=above, log=True, ticks=tuple(tick for tick in ticks if below <= tick <= above))


def _path(curve: Curve, smoothed: Curve | None, scale: Scale, last_step: int) -> Path:
    line, dots = _draw(curve, scale, last_step)
    return Path(line=line, dots=dots, smooth="" if smoothed is None else _draw(smoothed, scale, last_step)[0])


def _draw(curve: Curve, scale: Scale, last_step: int) -> tuple[str, str]:
    """The line, in pieces between gaps, and the dots."""
    pieces: list[list[str]] = [[]]
    for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True):
        y = scale.y(value)
        if y is not None:
            pieces[-1].append(f"{_short(WIDTH * step / last_step)},{_short(y)}")
        elif pieces[-1]:
            pieces.append([])
    width = WIDTH * int(curve.steps[-1] - curve.steps[0]) / last_step
    few = (len(curve.values) - 1) * _ROOM <= width
    alone = [point for piece in pieces for point in piece if few or len(piece) == 1]
    line = "".join("M" + " ".join(piece) for piece in pieces if len(piece) > 1)
    return line, "".join(f"M{point}h0" for point in alone)


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _in_words(curve: Curve, measure: Measure) -> str:
    """A curve for those who do not see it."""
    told = np.flatnonzero(~np.isnan(curve.values))
    places = {
        "from": told[0],
        "to": told[-1],
        "lowest": np.nanargmin(curve.values),
        "highest": np.nanargmax(curve.values),
    }
    return ", ".join(
        f"{name} {in_words(float(curve.values[place]), measure.format)} at step {curve.steps[place]:,}"
        for name, place in places.items()
    )


def chart_data(chart: Chart) -> dict[str, Any]:
    """What the page's script needs to show readings at a step."""
    return {
        "format": chart.measure.format,
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
