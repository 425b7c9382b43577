"""A run compares its kNN accuracy with that of the untrained network and with its own best."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
from small_runs import CONFIG, changed, run

from msf_faiss.evaluate.knn import KnnScore
from msf_faiss.report.metrics import read_metrics
from msf_faiss.run.events import Event, KnnEvaluated, RunStarted
from msf_faiss.train import trainer
from msf_faiss.train.monitors import KnnMonitor

IMAGES = 10_000
EVERY = {"every_epochs": 1}


def evaluations(events: list[Event]) -> list[KnnEvaluated]:
    return [event for event in events if isinstance(event, KnnEvaluated)]


def scripted(monkeypatch: pytest.MonkeyPatch, accuracies: Iterator[float]) -> None:
    """Let the evaluations of a run find these accuracies."""

    def evaluate(*_: object, **__: object) -> KnnScore:
        correct = round(next(accuracies) * IMAGES)
        return KnnScore(k=5, temperature=None, correct=correct, images=IMAGES, mean_per_class=0.5, leave_one_out=False)

    monkeypatch.setattr(trainer, "evaluate_knn", evaluate)


@pytest.mark.parametrize(
    ("accuracies", "images", "warnings"),
    [
        ([0.371, 0.346], 3_400, [1]),  # blood cells
        ([0.10, 0.23, 0.256, 0.249, 0.231], 10_000, [4]),  # Tiny-ImageNet
        ([0.371, 0.346, 0.340, 0.35], 3_400, [1]),  # said once
        ([0.371, 0.346, 0.38, 0.34], 3_400, [1, 3]),
        ([0.30, 0.52, 0.50, 0.51], 400, []),  # as chance may have it
        ([0.5, 0.7, 0.6, 0.4], 10_000, [2, 3]),
        ([0.5], 10_000, []),
        ([0.5, 0.5, 0.5], 10_000, []),
    ],
)
def test_warnings_of_training_that_does_harm(accuracies: list[float], images: int, warnings: list[int]) -> None:
    monitor = KnnMonitor(20)
    said = {step: monitor.update(step, accuracy, images) for step, accuracy in enumerate(accuracies)}
    assert [step for step, text in said.items() if text is not None] == warnings
    for step in warnings:
        reference = accuracies[0] if accuracies[step] < accuracies[0] else max(accuracies[1 : step + 1])
        assert f"{accuracies[step]:.1%}" in (said[step] or "")
        assert f"{reference:.1%}" in (said[step] or "")


def test_a_run_begins_with_the_untrained_network(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    events = run(CONFIG, run_dir)
    assert isinstance(events[0], RunStarted)
    assert events[0].evaluates_untrained
    first, *later = evaluations(events)
    assert (first.step, first.epoch, first.untrained, first.best, first.images) == (0, 0.0, first.accuracy, None, 20)
    assert {event.untrained for event in later} == {first.accuracy}
    assert later[-1].best == max(event.accuracy for event in later)
    heartbeat = json.loads((run_dir / "status.json").read_text())
    assert (heartbeat["knn_accuracy"], heartbeat["knn_untrained"]) == (later[-1].accuracy, first.accuracy)
    assert (heartbeat["knn_best"], heartbeat["knn_k"]) == (later[-1].best, 5)
    run(CONFIG, run_dir, resume="auto")  # trains no step
    again = json.loads((run_dir / "status.json").read_text())
    assert {name: again[name] for name in again if name.startswith("knn_")} == {
        name: heartbeat[name] for name in heartbeat if name.startswith("knn_")
    }
    curve = read_metrics(run_dir / "metrics.jsonl").curves["knn_accuracy"]
    assert (curve.steps.tolist(), curve.values[0]) == ([0, 8, 12], first.accuracy)
    assert not evaluations(run(changed(knn={"every_epochs": None}), tmp_path / "never"))
    paths = [path / "checkpoints" / "step-00000012" / "model.safetensors" for path in (run_dir, tmp_path / "never")]
    assert paths[0].read_bytes() == paths[1].read_bytes()  # evaluations leave no trace in the weights
    assert safetensors.torch.load_file(paths[0])


def test_the_checkpoint_of_the_best_accuracy_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(knn=EVERY, checkpoint={"every_epochs": 1, "keep_last": 1}, train={"epochs": 4})
    scripted(monkeypatch, iter([0.5, 0.7, 0.4, 0.45, 0.6]))
    events = run(config, tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000016"]
    assert [event.warning is not None for event in evaluations(events)] == [False, False, True, False, True]
    assert [(event.best, event.best_step) for event in evaluations(events)][1:] == [(0.7, 4)] * 4
    marks = [mark for mark in read_metrics(tmp_path / "run" / "metrics.jsonl").marks if mark.kind == "knn"]
    assert [mark.step for mark in marks] == [8, 16]
    assert "below that of the untrained network, 50.0%" in marks[0].text


def test_a_best_accuracy_without_checkpoint_keeps_the_next_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(knn=EVERY, checkpoint={"every_epochs": 2, "keep_last": 1}, train={"epochs": 6})
    scripted(monkeypatch, iter([0.1, 0.9, 0.7, 0.2, 0.3, 0.8, 0.5]))
    run(config, tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000024"]


def test_a_resumed_run_remembers_its_accuracies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(knn=EVERY, checkpoint={"every_epochs": 1, "keep_last": 1}, train={"epochs": 4})
    scripted(monkeypatch, iter([0.5, 0.7, 0.6, 0.45, 0.6]))
    run(config, tmp_path / "run", stop_after=9)
    events = run(config, tmp_path / "run", resume="auto")
    assert isinstance(events[0], RunStarted)
    assert not events[0].evaluates_untrained
    assert [(event.step, event.untrained, event.best) for event in evaluations(events)] == [
        *((12, 0.5, 0.7), (16, 0.5, 0.7))
    ]
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()
    branch = changed(knn={"every_epochs": 1, "k": 3}, train={"epochs": 5})
    scripted(monkeypatch, iter([0.4]))
    (event,) = evaluations(run(branch, tmp_path / "b", resume=tmp_path / "run", allow=["knn", "train", "checkpoint"]))
    assert (event.untrained, event.best, event.best_step) == (None, 0.4, 20)  # other neighbours, another accuracy


def test_missing_labels_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = trainer.open_source

    def without_test_labels(data: object, split: str) -> object:
        source = opened(data, split)  # type: ignore[arg-type]
        if split == "test" and source is not None:
            source.labels = None  # type: ignore[misc]
        return source

    monkeypatch.setattr(trainer, "open_source", without_test_labels)
    started = run(CONFIG, tmp_path / "run")[0]
    assert isinstance(started, RunStarted)
    assert any("held-out images have no labels" in note for note in started.notes)
