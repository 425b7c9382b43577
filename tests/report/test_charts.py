"""Scales, ticks, paths and grouping of charts."""

import math
import re
from importlib import resources

import numpy as np
import pytest

from msf_faiss.report.charts import (
    HEIGHT,
    WIDTH,
    MetricInfo,
    chart_data,
    format_value,
    make_charts,
    round_ticks,
    step_ticks,
)
from msf_faiss.report.metrics import Curve, Metrics


def metrics(**curves: list[tuple[int, float]]) -> Metrics:
    return Metrics(
        curves={
            name: Curve(np.array([step for step, _ in points]), np.array([value for _, value in points], float))
            for name, points in curves.items()
        },
        marks=(),
        skipped=0,
    )


def only_chart(*runs: Metrics):
    ((chart,),) = make_charts(runs).values()
    return chart


def points(path: str) -> list[list[tuple[float, float]]]:
    """Parse a path into its pieces, as a browser would."""
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in piece.split())]
        for piece in path.replace("h0", "").split("M")[1:]
    ]


@pytest.mark.parametrize("seed", range(40))
def test_ticks_are_round_and_enclose_all_values(seed: int) -> None:
    random = np.random.default_rng(seed)
    low, high = sorted((random.standard_normal(2) * 10.0 ** random.integers(-9, 9)).tolist())
    ticks = round_ticks(low, high)
    slack = 1e-6 * (high - low)  # a tick may equal the value up to rounding
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 3 <= len(ticks) <= 8
    steps = np.diff(ticks)
    assert steps.min() > 0
    mantissa = float(f"{steps[0]:e}".split("e")[0])
    assert min(abs(mantissa - each) for each in (1, 2, 2.5, 5, 10)) < 1e-3


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-12, 5e-324, 1e299, -1e299])
def test_constant_value_has_a_scale(value: float) -> None:
    chart = only_chart(metrics(something=[(1, value), (2, value)]))
    assert chart.linear.low < chart.linear.high
    y = chart.linear.y(value)
    assert y is not None
    assert 0 <= y <= HEIGHT


@pytest.mark.parametrize(("low", "high"), [(-1e299, 1e299), (1e15, 1e15 + 0.25), (0.0, 5e-324), (0.1, 0.1 + 1e-16)])
def test_extreme_ranges_stay_inside_the_plot(low: float, high: float) -> None:
    chart = only_chart(metrics(loss=[(1, low), (2, high)]))
    heights = [y for piece in points(chart.series[0].linear.line + chart.series[0].linear.dots) for _, y in piece]
    assert all(0 <= y <= HEIGHT for y in heights)


def test_step_ticks() -> None:
    assert step_ticks(1) == [0, 1]
    assert step_ticks(1240) == [0, 500, 1000]
    assert step_ticks(300_000) == [0, 100_000, 200_000, 300_000]
    for last in range(1, 2000):
        assert 2 <= len(step_ticks(last)) <= 6


def test_path_has_all_points_and_breaks_at_gaps() -> None:
    values = [(100, 0.0), (200, 1.0), (300, math.nan), (400, 0.5), (500, math.nan), (600, 0.25), (1000, 0.75)]
    path = only_chart(metrics(purity=values)).series[0].linear
    scaled = {step: (WIDTH * step / 1000, HEIGHT * (1 - value)) for step, value in values}
    assert points(path.line) == [[scaled[100], scaled[200]], [scaled[600], scaled[1000]]]
    assert points(path.dots) == [[scaled[step]] for step in (100, 200, 400, 600, 1000)]  # few points, so all have dots


def test_dense_curves_have_dots_only_for_isolated_points() -> None:
    dense = [(step, float(step)) for step in range(100)] + [(100, math.nan), (101, 1.0), (102, math.nan)]
    path = only_chart(metrics(something=dense)).series[0].linear
    assert len(points(path.line)) == len(points(path.dots)) == 1
    assert points(path.dots)[0][0][0] == pytest.approx(1000 * 101 / 102, abs=0.1)


def test_single_step_is_a_dot() -> None:
    path = only_chart(metrics(loss=[(10, 0.5)])).series[0].linear
    assert (path.line, path.smooth) == ("", "")
    assert len(points(path.dots)) == 1


def test_log_scale_omits_non_positive_values() -> None:
    chart = only_chart(metrics(loss=[(1, 0.0), (2, 0.01), (3, 10.0), (4, -1.0), (5, 0.1)]))
    assert chart.log is not None
    assert (chart.log.low, chart.log.high) == (0.01, 10)
    heights = [y for piece in points(chart.series[0].log.dots) for _, y in piece]
    assert heights == pytest.approx([HEIGHT, 0, HEIGHT * 2 / 3], abs=0.1)
    assert only_chart(metrics(loss=[(1, 0.0), (2, -1.0)])).log is None
    assert only_chart(metrics(purity=[(1, 0.5)])).log is None


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.4), (1e-9, 1e9), (1.0, 1.0), (1e-280, 1.0), (0.999, 1.001)])
def test_log_ticks_enclose_all_values(low: float, high: float) -> None:
    log = only_chart(metrics(loss=[(1, low), (2, high)])).log
    assert log.low <= low <= high <= log.high
    assert log.low < log.high
    assert len(log.ticks) <= 9


def test_groups_contain_all_metrics_in_reading_order() -> None:
    one = [(1, 1.0)]
    drawn = make_charts(
        [
            metrics(
                bank_probes=one,
                novel_ratio=one,
                loss=one,
                epoch=one,
                knn_k=one,
                recall_at_k=one,
                unreadable_images=one,
            )
        ]
    )
    assert {group: [chart.name for chart in charts] for group, charts in drawn.items()} == {
        "Learning": ["loss"],
        "Bank": ["recall_at_k", "bank_probes"],
        "Speed": ["unreadable_images"],
        "More": ["novel_ratio"],
    }
    assert drawn["More"][0].info == MetricInfo("Novel ratio", format="percent")
    assert make_charts([metrics(unreadable_images=[(1, 0.0)])]) == {}
    assert make_charts([]) == make_charts([metrics()]) == {}


def test_knn_chart_names_k_and_images_if_runs_agree() -> None:
    def run(k: float, leave_one_out: float) -> Metrics:
        return metrics(knn_accuracy=[(1, 0.5)], knn_k=[(1, k)], knn_leave_one_out=[(1, leave_one_out)])

    chart = only_chart(run(20, 0), run(20, 0), metrics())
    assert (chart.info.title, chart.info.description) == ("20-NN accuracy", "frozen features, on held-out images")
    chart = only_chart(run(20, 1), run(5, 1))
    assert chart.info.title == "kNN accuracy"
    assert chart.info.description.endswith("leave-one-out on the training images")
    assert only_chart(run(20, 1), run(20, 0)).info.description == "frozen features"


def test_runs_of_different_lengths_share_axes() -> None:
    chart = only_chart(metrics(loss=[(100, 1.0), (200, 0.5)]), metrics(), metrics(loss=[(400, 2.0)]))
    assert [series.run for series in chart.series] == [0, 2]
    assert [x for x, _ in points(chart.series[0].linear.line)[0]] == [250, 500]
    assert points(chart.series[1].linear.dots) == [[(1000, 0)]]


def test_format_value() -> None:
    assert format_value(0.12345) == "0.1235"
    assert format_value(1.688e-7) == "1.688e-7"
    assert format_value(12345.6) == "12,346"
    assert format_value(0.98765, "percent") == "98.8%"
    assert format_value(16384.4, "count") == "16,384"
    assert format_value(0.081234, "ms") == "0.0812 ms"
    assert format_value(4321.9, "ms") == "4,322 ms"
    assert format_value(None) == format_value(math.nan, "percent") == "–"


def test_chart_data_contains_only_numbers() -> None:
    data = chart_data(only_chart(metrics(loss=[(1, 0.123456789), (2, math.nan)])))
    assert data["series"] == [{"run": 0, "steps": [1, 2], "values": [0.12346, None]}]


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb, by WCAG 2."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_runs_have_distinct_readable_colors_and_dashes() -> None:
    style = resources.files("msf_faiss.report").joinpath("report.css").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\n *\}", style, re.S)[:2]
    )
    for theme in (light, dark):
        colors = [theme[f"c{run}"] for run in range(8)]
        assert len(set(colors)) == 8
        for color in colors:
            lighter, darker = sorted((luminance(color), luminance(theme["card"])), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (
                color
            )  # WCAG requires 3 for graphics and 4.5 for small text
    dashes = re.findall(r"\.dash-\d \{ --dash: (.*?); \}", style)
    assert len(dashes) == len(set(dashes)) == 8
