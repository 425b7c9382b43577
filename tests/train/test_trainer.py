"""The training loop: events, errors, and what must not influence training."""

import itertools
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same_tensors, metrics, tensors
from small_runs import CONFIG, STEPS, changed, run

from msf_faiss.bank import RingSpec
from msf_faiss.bank.scan import SCAN_BANKS, ScanLimits
from msf_faiss.bank.scan.pq import PqScanBank
from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.checkpoint.load import load_bank
from msf_faiss.config import (
    BankConfig,
    DataConfig,
    FlatBankConfig,
    FolderData,
    IvfBankConfig,
    ReferenceBankConfig,
    ScanBankConfig,
)
from msf_faiss.config.load import load_config
from msf_faiss.data.source import Reduce, Source, UnreadableImageError
from msf_faiss.errors import UserError
from msf_faiss.run.events import (
    CachingImages,
    CheckpointSaved,
    Event,
    KnnEvaluated,
    RunEnded,
    RunStarted,
    TrainingProgress,
)
from msf_faiss.train.trainer import pretrain


def test_events_of_a_run_in_order(finished: tuple[Path, list[Event]]) -> None:
    run_dir, events = finished
    started, ended = events[0], events[-1]
    assert isinstance(started, RunStarted)
    assert (started.images, started.classes, started.steps_per_epoch, started.total_steps) == (70, 10, STEPS, 12)
    assert started.first_step == 0
    assert isinstance(ended, RunEnded)
    assert (ended.step, ended.epoch, ended.reason) == (12, 3.0, "finished")
    steps = [event for event in events if isinstance(event, TrainingProgress)]
    assert [event.step for event in steps] == list(range(1, 13))
    assert [event.step for event in events if isinstance(event, KnnEvaluated)] == [0, 8, 12]
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [4, 8, 12]
    for event in steps:
        assert 0 <= event.loss <= 4
        assert event.purity is None or 0 <= event.purity <= 1
        assert event.data_time_ratio + event.bank_time_ratio + event.model_time_ratio == pytest.approx(1)
        assert event.images_per_second > 0
    assert [round(event.bank_fill_ratio, 2) for event in steps[:8]] == [0.16, 0.32, 0.48, 0.64, 0.8, 0.96, 1.0, 1.0]
    assert steps[-1].eta_seconds == 0
    assert ended.checkpoint == run_dir / "checkpoints" / "step-00000012"


def test_run_directory_contains_config_and_metrics(finished: tuple[Path, list[Event]]) -> None:
    run_dir, events = finished
    assert load_config(run_dir / "config.yaml") == CONFIG
    assert find_checkpoint(run_dir).config == CONFIG
    lines = metrics(run_dir)
    assert all({"step", "epoch", "loss"} <= line.keys() for line in lines)
    assert [line["loss"] for line in lines if "purity" in line] == [
        r.loss for r in events if isinstance(r, TrainingProgress)
    ]
    assert [(line["step"], line["knn_accuracy"]) for line in lines if "knn_accuracy" in line] == [
        (event.step, event.accuracy) for event in events if isinstance(event, KnnEvaluated)
    ]
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))


def test_caching_images_is_an_event_and_changes_no_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for index in range(20):
        pixels = generator.integers(0, 256, (20 + index, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index:02}.png")
    memory = sum(3 * 24 * (20 + index) for index in range(20))
    runs = {rule: tmp_path.with_name(f"{tmp_path.name}-{rule}") for rule in ("memory", "auto", "none")}
    for rule, run_dir in runs.items():
        data = FolderData(path=tmp_path, cache=rule, workers=0, labels="none")
        events = run(CONFIG.model_copy(update={"data": data}), run_dir)
        caching = [event for event in events if isinstance(event, CachingImages)]
        assert caching == ([] if rule == "none" else [CachingImages(images=20, memory=memory)])
    assert_same_tensors(runs["memory"], runs["none"], 3)


def test_error_in_the_data_creates_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not fill a batch"):
        run(changed(train={"batch_size": 71}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Failing:
    """A source that fails to decode from the image number `first` on."""

    def __init__(self, source: Source, first: int, error: Exception) -> None:
        self._source, self._left, self._error = source, first, error

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def decode(self, index: int, reduce: Reduce | None = None) -> torch.Tensor:
        self._left -= 1
        if self._left < 0:
            raise self._error
        return self._source.decode(index, reduce)


@pytest.mark.parametrize(
    ("split", "images", "error", "step"),
    [
        ("train", 16 * 7, UnreadableImageError("a.png: cannot read this image"), 6),  # 16 of them before the first step
        ("train", 16 * 7, UserError("a worker process died"), 6),
        ("train", 16 * 7, OSError(5, "Input/output error"), 6),
        ("test", 10, UnreadableImageError("b.png: cannot read this image"), 8),
        ("train", 24, UnreadableImageError("a.png: cannot read this image"), None),  # nothing to lose
    ],
)
def test_error_in_the_data_loses_no_step(
    finished: tuple[Path, list[Event]], tmp_path: Path, split: str, images: int, error: Exception, step: int | None
) -> None:
    from msf_faiss.train import trainer

    opened = trainer.open_source
    config = changed(checkpoint={"every_epochs": 9})

    def open_failing(data: DataConfig, which: Literal["train", "test"]) -> object:
        source = opened(data, which)
        assert source is not None
        # The evaluation of the untrained network has read all of them.
        return Failing(source, len(source) + images, error) if which == split else source

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "open_source", open_failing)
        with pytest.raises(type(error), match=str(error.args[-1])):
            list(pretrain(config, tmp_path / "run"))
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ([] if step is None else [f"step-{step:08d}"])
    run(config, tmp_path / "run", resume="auto")
    assert_same_tensors(tmp_path / "run", finished[0], 12, evaluations=split == "train")  # one was not completed


@pytest.mark.parametrize(
    "bank",
    [FlatBankConfig(), ScanBankConfig(scan="int8"), ScanBankConfig(scan="pq"), IvfBankConfig()],
    ids=["flat", "int8", "pq", "ivf"],
)
def test_diverged_targets_end_the_run_in_the_words_of_the_loss_check(
    bank: BankConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bank refuses them before the loss that explains them is due to be checked."""
    from msf_faiss.train import step

    class ScanningPq(PqScanBank):
        def __init__(self, spec: RingSpec) -> None:
            super().__init__(spec, limits=ScanLimits(newest=8, training=16))

    monkeypatch.setitem(SCAN_BANKS, "pq", ScanningPq)
    factors = iter([1.0] * 6 + [float("nan")] * 9)
    loss = step.mean_shift_loss
    monkeypatch.setattr(step, "mean_shift_loss", lambda queries, means: next(factors) * loss(queries, means))
    config = changed(train={"log_every": 100}, knn={"every_epochs": None}, checkpoint={"every_epochs": None})
    config = config.model_copy(update={"bank": bank.model_copy(update={"capacity": 100, "k": 3})})
    with pytest.raises(UserError, match="the loss of step 7 is nan: training has diverged"):
        run(config, tmp_path / "run")
    assert len(list(factors)) == 8, "the run ends at the first targets that are not finite"


def test_non_finite_loss_ends_the_run_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    config = changed(optimizer={"learning_rate": 1e30}, train={"log_every": 3}, knn={"every_epochs": None})
    with pytest.raises(UserError, match=r"training has diverged. Lower optimizer.learning_rate"):
        run(config, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    # After a checkpoint: it stays the newest.
    run(CONFIG, tmp_path / "good", stop_after=5)
    from msf_faiss.train import step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "mean_shift_loss", lambda q, m: (q * float("nan")).sum())
        with pytest.raises(UserError, match="the loss of step 6 is nan"):
            run(CONFIG, tmp_path / "good", resume="auto")
    assert find_checkpoint(tmp_path / "good").step == 5


def test_losses_are_checked_before_an_evaluation_or_a_save(tmp_path: Path) -> None:
    events = run(changed(train={"log_every": 1000}), tmp_path / "run")
    assert [event.step for event in events if isinstance(event, TrainingProgress)] == [4, 8, 12]
    assert all(isinstance(line["loss"], float) for line in metrics(tmp_path / "run") if line["step"])
    from msf_faiss.train import step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "mean_shift_loss", lambda queries, means: (queries * float("nan")).sum())
        with pytest.raises(UserError, match="the loss of step 1 is nan"):
            run(changed(train={"log_every": 1000}), tmp_path / "bad")


def test_max_steps_does_not_change_the_schedule(finished: tuple[Path, list[Event]], tmp_path: Path) -> None:
    events = run(changed(train={"max_steps": 6}), tmp_path / "run")
    assert isinstance(events[-1], RunEnded)
    assert (events[-1].step, events[-1].reason) == (6, "finished")
    rates = [event.learning_rate for event in events if isinstance(event, TrainingProgress)]
    assert rates == [r.learning_rate for r in finished[1] if isinstance(r, TrainingProgress)][:6]


def test_abandoned_run_can_be_started_again(tmp_path: Path) -> None:
    events = list(itertools.islice(pretrain(CONFIG, tmp_path / "run"), 4))
    assert [type(event) for event in events] == [RunStarted, KnnEvaluated, TrainingProgress, TrainingProgress]
    run(CONFIG, tmp_path / "run")  # no checkpoint was saved, so nothing is lost


def test_labels_do_not_influence_training(finished: tuple[Path, list[Event]], tmp_path: Path) -> None:
    """Without labels the weights are the same, bit for bit."""
    from msf_faiss.train import trainer

    opened = trainer.open_source

    class Unlabelled:
        def __init__(self, source: object) -> None:
            self._source = source
            self.labels, self.classes = None, None

        def __getattr__(self, name: str) -> object:
            return getattr(self._source, name)

        def __len__(self) -> int:
            return len(self._source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "open_source", lambda data, split: Unlabelled(opened(data, split)))
        events = run(CONFIG, tmp_path / "run")
    assert isinstance(events[0], RunStarted)
    assert events[0].classes is None
    assert all(event.purity is None for event in events if isinstance(event, TrainingProgress))
    assert not any(isinstance(event, KnnEvaluated) for event in events)
    assert_same_tensors(tmp_path / "run", finished[0], 12, evaluations=False)


def test_bfloat16_with_the_reference_bank(tmp_path: Path) -> None:
    bank = ReferenceBankConfig(capacity=100, k=3, dtype="bfloat16")
    config = changed(train={"precision": "bfloat16", "max_steps": 3}).model_copy(update={"bank": bank})
    assert isinstance(run(config, tmp_path / "run")[-1], RunEnded)


def test_bank_larger_than_memory_is_refused(tmp_path: Path) -> None:
    bank = FlatBankConfig(capacity="900TiB", k=3)
    with pytest.raises(UserError, match=r"^bank.capacity: .* entries of 40 bytes need 921,600.0 GiB, but cpu has"):
        run(CONFIG.model_copy(update={"bank": bank}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bank_of_the_size_of_the_data_set(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"bank": FlatBankConfig(capacity="dataset", k=3)})
    events = run(config, tmp_path / "run")
    assert isinstance(events[0], RunStarted)
    assert "70 entries" in events[0].bank
    assert tensors(tmp_path / "run", 12)["bank.embeddings"].shape == (70, 8)
    assert len(load_bank(find_checkpoint(tmp_path / "run"), torch.device("cpu"))) == 70
