"""Progress events, and events that monitors trigger."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import assert_same_tensors, metrics
from small_runs import CONFIG, changed, run

from msf_faiss.bank import ReferenceBank, RingSpec
from msf_faiss.config import Config, RecallCheckConfig, ScanBankConfig
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.errors import UserError
from msf_faiss.run.events import (
    BankAdjusted,
    CollapseDetected,
    Event,
    RunStarted,
    TimeEstimated,
    TrainingProgress,
)
from msf_faiss.run.status import read_status
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.train.monitors import Spread
from msf_faiss.train.progress import note_small_images
from msf_faiss.train.trainer import pretrain


def test_engines_are_timed_only_with_engine_auto(finished: tuple[Path, list[Event]], tmp_path: Path) -> None:
    assert isinstance(finished[1][0], RunStarted)
    assert finished[1][0].engine_ms.keys() == {"faiss", "torch"}
    assert next(iter(finished[1][0].engine_ms)) in finished[1][0].bank
    started = next(iter(pretrain(changed(bank={"engine": "faiss"}), tmp_path / "run")))
    assert isinstance(started, RunStarted)
    assert started.engine_ms == {}
    assert "engine faiss" in started.bank
    with pytest.raises(UserError, match="bank: no engine streams on cpu; choose one of faiss, torch"):
        next(iter(pretrain(changed(bank={"engine": "streams"}), tmp_path / "streams")))


@pytest.mark.parametrize(("log_every", "stop_after", "estimated"), [(5, 3, [2, 5]), (2, 3, []), (5, 1, [])])
def test_time_is_estimated_after_the_second_step(
    tmp_path: Path, log_every: int, stop_after: int, estimated: list[int]
) -> None:
    """Of each process, unless the first report is as early."""
    config = changed(train={"log_every": log_every})
    events = run(config, tmp_path / "run", stop_after=stop_after)
    if estimated:
        beat = read_status(tmp_path / "run").heartbeat
        assert beat is not None
        assert beat.eta_seconds is not None
    events += run(config, tmp_path / "run", resume="auto", stop_after=stop_after)
    found = [event for event in events if isinstance(event, TimeEstimated)]
    assert [event.step for event in found] == estimated
    for event in found:
        assert event.eta_seconds == pytest.approx(16 * (12 - event.step) / event.images_per_second)


@pytest.mark.parametrize(
    ("size", "views", "noted"), [(16, 32, True), (16, 31, False), (32, 128, True), (40, 32, False)]
)
def test_views_of_small_images_are_noted(size: int, views: int, noted: bool) -> None:
    source = MemorySource(torch.zeros(3, 3, size, 2 * size, dtype=torch.uint8), title="set")
    notes = list(note_small_images(source, views))
    assert len(notes) == noted
    if noted:
        assert notes[0].startswith(f"the images are about {size} px, but the views {views} px: views.size={size} shows")


def test_size_of_a_photograph_is_that_before_reduction(tmp_path: Path) -> None:
    Image.new("RGB", (900, 700)).save(tmp_path / "one.jpg")
    assert list(note_small_images(FolderSource(tmp_path), 400)) == []
    (tmp_path / "two.jpg").touch()  # unreadable
    assert "about 700 px" in next(note_small_images(FolderSource(tmp_path), 1400))


class Forgetful(ReferenceBank):
    """Misses the second neighbour of each query until `raise_recall`."""

    missing = True

    def search_exactly(self, queries: torch.Tensor, k: int) -> Neighbors:
        return super()._search(queries, min(k, self.searchable))

    def _search(self, queries: torch.Tensor, k: int) -> Neighbors:
        found = super()._search(queries, k)
        if self.missing and k > 2:
            worst = super()._search(queries, self.searchable)
            found.slots[:, 1], found.similarities[:, 1] = worst.slots[:, -1], worst.similarities[:, -1]
        return found

    def raise_recall(self) -> str:
        self.missing = False
        return "now exact"

    def metrics(self) -> dict[str, float]:
        return {"missed": float(self.missing)}

    def _index_state(self) -> dict[str, torch.Tensor]:
        return {"missing": torch.tensor(self.missing)}

    def _load_index(self, state: dict[str, torch.Tensor]) -> None:
        self.missing = bool(state["missing"])


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Config:
    """A config with a `Forgetful` bank, checked every five steps."""
    from msf_faiss.train import state

    monkeypatch.setattr(state, "create_bank", lambda config, *, dim, **rest: Forgetful(RingSpec(config.capacity, dim)))
    bank = ScanBankConfig(
        capacity=100, k=3, scan="int8", min_recall=0.9, recall_check=RecallCheckConfig(every_steps=5, queries=8)
    )
    return changed(train={"log_every": 4}).model_copy(update={"bank": bank})


def test_bank_adjustment_is_an_event(forgetful: Config, tmp_path: Path) -> None:
    events = run(forgetful, tmp_path / "run")
    adjusted = [event for event in events if isinstance(event, BankAdjusted)]
    assert [(event.step, event.epoch) for event in adjusted] == [(5, 1.25)]
    text = adjusted[0].text
    assert text == "recall 0.500 is below 0.9: now exact"
    steps = {event.step: event for event in events if isinstance(event, TrainingProgress)}
    assert list(steps) == [4, 5, 8, 12]
    assert [(event.recall_at_k, event.bank_metrics) for event in steps.values()] == [
        (None, {"missed": 1.0}),
        (None, {"missed": 0.0}),  # the recall before is forgotten
        (None, {"missed": 0.0}),
        (1.0, {"missed": 0.0}),
    ]
    assert events.index(adjusted[0]) == events.index(steps[5]) + 1
    lines = metrics(tmp_path / "run")
    assert [line for line in lines if "bank_adjusted" in line] == [
        {"step": 5, "epoch": 1.25, "loss": steps[5].loss, "bank_adjusted": text}
    ]
    assert [line["bank_missed"] for line in lines if "purity" in line] == [1, 0, 0, 0]
    assert all({"neighbor_age_p95", "hubness", "recall_at_k"} <= line.keys() for line in lines if "purity" in line)


@pytest.mark.parametrize("stop_after", [3, 4, 5, 6, 10])
def test_interruption_does_not_change_the_recall(forgetful: Config, tmp_path: Path, stop_after: int) -> None:
    """The checkpoint contains the counts of the checks and the state of the bank."""
    run(forgetful, tmp_path / "whole")
    run(forgetful, tmp_path / "stopped", stop_after=stop_after)
    run(forgetful, tmp_path / "stopped", resume="auto")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert_same_tensors(tmp_path / "stopped", tmp_path / "whole", 12)


def test_collapse_is_detected_once_across_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msf_faiss.train import progress

    measured = progress.measure_spread
    low = iter(range(1, 100))
    monkeypatch.setattr(
        progress, "measure_spread", lambda rows: Spread(0.01, 9.0) if next(low) >= 4 else measured(rows)
    )
    first = run(CONFIG, tmp_path / "run", stop_after=5)
    events = first + run(CONFIG, tmp_path / "run", resume="auto")
    collapses = [event for event in events if isinstance(event, CollapseDetected)]
    assert [(event.step, event.since, event.embedding_std) for event in collapses] == [(6, 4, 0.01)]
    assert [line["step"] for line in metrics(tmp_path / "run") if "collapse" in line] == [6]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["collapsing_since"] == 4
