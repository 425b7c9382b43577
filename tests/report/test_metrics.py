"""Reading metrics.jsonl, thinning and smoothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from runs_on_disk import record

from msf_faiss.errors import UserError
from msf_faiss.report.metrics import SMOOTHING_WINDOW, Curve, read_metrics, smooth, thin
from msf_faiss.run.metrics_file import HEADER


def write(path: Path, *lines: object) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(HEADER + text)
    return path


def random_curve(count: int, gaps: float = 0.0, seed: int = 0) -> Curve:
    random = np.random.default_rng(seed)
    values = random.standard_normal(count).cumsum()
    values[random.random(count) < gaps] = math.nan
    return Curve(np.cumsum(random.integers(1, 20, count)), values)


def test_each_numeric_field_is_a_curve(tmp_path: Path) -> None:
    lines = [record(10), record(20, bank_probes=8.0), record(20) | {"knn_k": 20, "knn_accuracy": 0.5}, record(30)]
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", *lines))
    assert metrics.curves["loss"].steps.tolist() == [10, 20, 30]
    assert metrics.curves["loss"].values.tolist() == [line["loss"] for line in (lines[0], lines[1], lines[3])]
    assert metrics.curves["bank_probes"].steps.tolist() == [20]
    assert metrics.curves["knn_accuracy"].values.tolist() == [0.5]
    assert metrics.last("neighbor_age_mean") == 130
    assert metrics.last("no such metric") is None
    assert (metrics.marks, metrics.skipped) == ((), 0)


def test_null_fields_have_no_curve_and_non_finite_values_are_gaps(tmp_path: Path) -> None:
    lines = [record(10), record(20, loss=math.nan, purity=None), record(30, loss=-math.inf, purity=0.25)]
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", *lines))
    assert "recall_at_k" not in metrics.curves
    assert np.isnan(metrics.curves["loss"].values).tolist() == [False, True, True]
    assert np.isnan(metrics.curves["purity"].values).tolist() == [False, True, False]
    assert metrics.last("loss") is None
    assert [(mark.kind, mark.step) for mark in metrics.marks] == [("loss", 20)]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 20, "lo',  # still being written, or cut short by a kill
        "",
        "\x00\x00\x00",
        '"\\ud800',
        "[" * 100_000,
        "[1, 2]",
        "7",
        '{"loss": 0.5}',
        '{"step": null}',
        '{"step": -1}',
        '{"step": 1.5}',
        '{"step": 9007199254740993}',
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_invalid_lines_are_skipped(tmp_path: Path, line: str, last: bool) -> None:
    path = write(tmp_path / "metrics.jsonl", record(10), *([] if last else [line, record(30)]))
    if last:
        with path.open("a") as file:
            file.write(line or " ")
    metrics = read_metrics(path)
    assert metrics.curves["loss"].steps.tolist() == ([10] if last else [10, 30])
    assert metrics.skipped == 1


def test_invalid_utf8_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(HEADER.encode() + b'{"step": 1, "loss": 0.5}\n\xff\xfe{"step": 2}\n')
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert (metrics.curves["loss"].steps.tolist(), metrics.skipped) == ([1], 1)


def test_huge_numbers_are_gaps(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 1' + "0" * 400 + "}", {"step": 2, "loss": 1e305}, {"step": 3, "loss": 1.0}]
    curve = read_metrics(write(tmp_path / "metrics.jsonl", *lines)).curves["loss"]
    assert np.isnan(curve.values).tolist() == [True, True, False]


def test_last_line_of_a_repeated_step_counts(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": float(place)} for place, step in enumerate((10, 20, 30, 20, 25, 40))]
    curve = read_metrics(write(tmp_path / "metrics.jsonl", *lines)).curves["loss"]
    assert curve.steps.tolist() == [10, 20, 25, 30, 40]
    assert curve.values.tolist() == [0, 3, 4, 2, 5]


def test_events_become_marks(tmp_path: Path) -> None:
    collapse = {"step": 30, "epoch": 0.3, "since": 10, "embedding_std": 0.051, "effective_rank": 1.44}
    lines = [
        {"step": 40, "epoch": math.nan, "loss": 0.5, "bank_adjusted": "recall 0.9"},
        {"step": 30, "epoch": 0.3, "loss": 0.5, "collapse": collapse},
        {"step": 50, "epoch": 0.5, "loss": math.nan},
        {"step": 60, "epoch": 0.6, "loss": math.nan},
        {"step": 70, "epoch": "?", "loss": 0.5, "collapse": {"since": "?"}},
    ]
    marks = read_metrics(write(tmp_path / "metrics.jsonl", *lines)).marks
    assert [(mark.step, mark.kind, mark.epoch) for mark in marks] == [
        (30, "collapse", 0.3),
        (40, "bank", None),
        (50, "loss", 0.5),
        (70, "collapse", None),
    ]
    assert marks[0].text == "the embeddings have been collapsing since step 10 (std 0.051, effective rank 1.44)"
    assert marks[1].text == "bank: recall 0.9"


def test_missing_or_empty_file_has_no_curves(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl").curves == {}
    assert read_metrics(write(tmp_path / "metrics.jsonl")).curves == {}


def test_read_metrics_refuses_other_format_versions(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first, version in ((record(10), 1), ({"format": "msf-faiss metrics", "version": 3}, 3)):
        path.write_text(json.dumps(first) + "\n")
        with pytest.raises(UserError, match=f"format version {version}, but this msf-faiss reads version 2"):
            read_metrics(path)


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 3_000, 20_011])
@pytest.mark.parametrize("gaps", [0.0, 0.3, 1.0])
def test_thin_keeps_ends_and_extremes(count: int, gaps: float) -> None:
    curve = random_curve(count, gaps)
    thinned = thin(curve, 100)
    assert len(thinned.steps) <= 100
    assert len(thinned.steps) == count or count > 100
    places = np.searchsorted(curve.steps, thinned.steps)
    assert (curve.steps[places] == thinned.steps).all()
    np.testing.assert_array_equal(curve.values[places], thinned.values)
    assert {curve.steps[0], curve.steps[-1]} <= set(thinned.steps.tolist())
    if not np.isnan(curve.values).all():
        assert np.nanmin(thinned.values) == np.nanmin(curve.values)
        assert np.nanmax(thinned.values) == np.nanmax(curve.values)


def test_thin_keeps_spikes() -> None:
    for place in range(0, 5_000, 37):
        values = np.zeros(5_000)
        values[place], values[-place - 1] = 1, -1
        thinned = thin(Curve(np.arange(5_000), values), 60).values
        assert (thinned.max(), thinned.min()) == (1, -1)


@pytest.mark.parametrize("count", [50, 51, 999, 4_001])
@pytest.mark.parametrize("gaps", [0.0, 0.3])
def test_smooth_is_the_running_mean(count: int, gaps: float) -> None:
    curve = random_curve(count, gaps)
    smoothed = smooth(curve)
    assert smoothed is not None
    assert len(smoothed.steps) == min(count, 400)
    half = max(2, round(count * SMOOTHING_WINDOW / 2))
    for step, value in zip(smoothed.steps.tolist(), smoothed.values.tolist(), strict=True):
        place = curve.steps.tolist().index(step)
        near = [x for x in curve.values[max(0, place - half) : place + half + 1].tolist() if not math.isnan(x)]
        if math.isnan(curve.values[place]):
            assert math.isnan(value)
        else:
            assert value == pytest.approx(math.fsum(near) / len(near), rel=1e-12, abs=1e-12)  # summed in another order


def test_short_curves_are_not_smoothed() -> None:
    assert smooth(random_curve(49)) is None
