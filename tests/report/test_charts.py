"""Scales, ticks and paths."""

import math
import re
from importlib import resources

import numpy as np
import pytest

from msf_faiss.report.charts import HEIGHT, WIDTH, Measure, chart_data, draw, in_words, round_ticks, step_ticks
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
    ((chart,),) = draw(runs).values()
    return chart


def points(path: str) -> list[list[tuple[float, float]]]:
    """The pieces of a path, as it is read by a browser."""
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in piece.split())]
        for piece in path.replace("h0", "").split("M")[1:]
    ]


@pytest.mark.parametrize("seed", range(40))
def test_ticks_are_round_and_hold_all_values(seed: int) -> None:
    random = np.random.default_rng(seed)
    low, high = sorted((random.standard_normal(2) * 10.0 ** random.integers(-9, 9)).tolist())
    ticks = round_ticks(low, high)
    slack = 1e-6 * (high - low)  # a tick that is the value but for rounding is not doubled by another
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 3 <= len(ticks) <= 8
    steps = np.diff(ticks)
    assert steps.min() > 0
    mantissa = float(f"{steps[0]:e}".split("e")[0])
    assert min(abs(mantissa - each) for each in (1, 2, 2.5, 5, 10)) < 1e-3


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-12, 5e-324, 1e299, -1e299])
def test_a_value_that_never_changes_has_a_scale(value: float) -> None:
    chart = only_chart(metrics(something=[(1, value), (2, value)]))
    assert chart.linear.low < chart.linear.high
    y = chart.linear.y(value)
    assert y is not None
    assert 0 <= y <= HEIGHT


@pytest.mark.parametrize(("low", "high"), [(-1e299, 1e299), (1e15, 1e15 + 0.25), (0.0, 5e-324), (0.1, 0.1 + 1e-16)])
def test_extreme_ranges_are_drawn(low: float, high: float) -> None:
    chart = only_chart(metrics(loss=[(1, low), (2, high)]))
    heights = [y for piece in points(chart.series[0].linear.line + chart.series[0].linear.dots) for _, y in piece]
    assert all(0 <= y <= HEIGHT for y in heights)


def test_steps_go_from_zero_to_the_last() -> None:
    assert step_ticks(1) == [0, 1]
    assert step_ticks(1240) == [0, 500, 1000]
    assert step_ticks(300_000) == [0, 100_000, 200_000, 300_000]
    for last in range(1, 2000):
        assert 2 <= len(step_ticks(last)) <= 6


def test_a_path_has_every_point_and_breaks_at_gaps() -> None:
    values = [(100, 0.0), (200, 1.0), (300, math.nan), (400, 0.5), (500, math.nan), (600, 0.25), (1000, 0.75)]
    path = only_chart(metrics(purity=values)).series[0].linear
    scaled = {step: (WIDTH * step / 1000, HEIGHT * (1 - value)) for step, value in values}
    assert points(path.line) == [[scaled[100], scaled[200]], [scaled[600], scaled[1000]]]
    assert points(path.dots) == [[scaled[step]] for step in (100, 200, 400, 600, 1000)]  # all: there is room


def test_dots_are_for_few_points_and_those_alone() -> None:
    dense = [(step, float(step)) for step in range(100)] + [(100, math.nan), (101, 1.0), (102, math.nan)]
    path = only_chart(metrics(something=dense)).series[0].linear
    assert len(points(path.line)) == len(points(path.dots)) == 1
    assert points(path.dots)[0][0][0] == pytest.approx(1000 * 101 / 102, abs=0.1)


def test_one_step_is_a_dot() -> None:
    path = only_chart(metrics(loss=[(10, 0.5)])).series[0].linear
    assert (path.line, path.smooth) == ("", "")
    assert len(points(path.dots)) == 1


def test_a_logarithm_leaves_out_what_has_none() -> None:
    chart = only_chart(metrics(loss=[(1, 0.0), (2, 0.01), (3, 10.0), (4, -1.0), (5, 0.1)]))
    assert chart.log is not None
    assert (chart.log.low, chart.log.high) == (0.01, 10)
    heights = [y for piece in points(chart.series[0].log.dots) for _, y in piece]
    assert heights == pytest.approx([HEIGHT, 0, HEIGHT * 2 / 3], abs=0.1)
    assert only_chart(metrics(loss=[(1, 0.0), (2, -1.0)])).log is None
    assert only_chart(metrics(purity=[(1, 0.5)])).log is None


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.4), (1e-9, 1e9), (1.0, 1.0), (1e-280, 1.0), (0.999, 1.001)])
def test_logarithmic_ticks_hold_all_values(low: float, high: float) -> None:
    log = only_chart(metrics(loss=[(1, low), (2, high)])).log
    assert log.low <= low <= high <= log.high
    assert log.low < log.high
    assert len(log.ticks) <= 9


def test_groups_are_in_reading_order_and_leave_nothing_out() -> None:
    one = [(1, 1.0)]
    drawn = draw(
        [
            metrics(
                bank_probes=one,
                novel_share=one,
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
        "More": ["novel_share"],
    }
    assert drawn["More"][0].measure == Measure("Novel share", format="percent")
    assert draw([metrics(unreadable_images=[(1, 0.0)])]) == {}
    assert draw([]) == draw([metrics()]) == {}


def test_the_title_of_knn_tells_k_and_voters_where_the_runs_agree() -> None:
    def run(k: float, alone: float) -> Metrics:
        return metrics(knn_accuracy=[(1, 0.5)], knn_k=[(1, k)], knn_leave_one_out=[(1, alone)])

    chart = only_chart(run(20, 0), run(20, 0), metrics())
    assert (chart.measure.title, chart.measure.about) == ("20-NN accuracy", "frozen features, on held-out images")
    chart = only_chart(run(20, 1), run(5, 1))
    assert chart.measure.title == "kNN accuracy"
    assert chart.measure.about.endswith("leave-one-out among the training images")
    assert only_chart(run(20, 1), run(20, 0)).measure.about == "frozen features"


def test_runs_of_different_lengths_share_their_axes() -> None:
    chart = only_chart(metrics(loss=[(100, 1.0), (200, 0.5)]), metrics(), metrics(loss=[(400, 2.0)]))
    assert [series.run for series in chart.series] == [0, 2]
    assert [x for x, _ in points(chart.series[0].linear.line)[0]] == [250, 500]
    assert points(chart.series[1].linear.dots) == [[(1000, 0)]]


def test_readings_in_words() -> None:
    assert in_words(0.12345) == "0.1235"
    assert in_words(1.688e-7) == "1.688e-7"
    assert in_words(12345.6) == "12,346"
    assert in_words(0.98765, "percent") == "98.8%"
    assert in_words(16384.4, "count") == "16,384"
    assert in_words(0.081234, "ms") == "0.0812 ms"
    assert in_words(4321.9, "ms") == "4,322 ms"
    assert in_words(None) == in_words(math.nan, "percent") == "–"


def test_the_script_gets_numbers_alone() -> None:
    data = chart_data(only_chart(metrics(loss=[(1, 0.123456789), (2, math.nan)])))
    assert data["series"] == [{"run": 0, "steps": [1, 2], "values": [0.12346, None]}]


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb, by WCAG 2."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_runs_differ_by_color_and_by_dash_in_light_and_dark() -> None:
    style = resources.files("msf_faiss.report").joinpath("report.css").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\n *\}", style, re.S)[:2]
    )
    for theme in (light, dark):
        colors = [theme[f"c{run}"] for run in range(8)]
        assert len(set(colors)) == 8
        for color in colors:
            lighter, darker = sorted((luminance(color), luminance(theme["card"])), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, color  # WCAG asks 3 of graphics, 4.5 of small text
    dashes = re.findall(r"\.dash-\d \{ --dash: (.*?); \}", style)
    assert len(dashes) == len(set(dashes)) == 8
