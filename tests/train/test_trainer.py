import gzip
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import metrics, tensors

from msf_faiss.bank import Bank, ReferenceBank, RingSpec, create_bank
from msf_faiss.bank.scan import SCAN_BANKS, ScanLimits
from msf_faiss.bank.scan.base import ApproximateScanBank
from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.checkpoint.load import load_bank
from msf_faiss.config import (
    BankConfig,
    CheckpointConfig,
    Config,
    DemoData,
    FlatBankConfig,
    FolderData,
    IvfBankConfig,
    IvfConfig,
    KnnConfig,
    ModelConfig,
    NarrowBackbone,
    RecallCheckConfig,
    ReferenceBankConfig,
    ScanBankConfig,
    TrainConfig,
    ViewsConfig,
)
from msf_faiss.config.load import load_config
from msf_faiss.errors import UserError
from msf_faiss.run.events import (
    BankAdjusted,
    CachingImages,
    CheckpointSaved,
    CollapseDetected,
    Event,
    KnnEvaluated,
    RunEnded,
    RunStarted,
    StepProfiled,
    TrainingProgress,
)
from msf_faiss.run.recorder import Recorder
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.train.monitors import Spread
from msf_faiss.train.resume import Resume
from msf_faiss.train.state import TrainState
from msf_faiss.train.trainer import pretrain

CONFIG = Config(
    seed=1,
    data=DemoData(images=70, test_images=20, size=16),
    views=ViewsConfig(size=16),
    model=ModelConfig(backbone=NarrowBackbone(width=4, depths=(1, 1), strides=(2, 2)), dim=8),
    bank=FlatBankConfig(capacity=100, k=3),
    train=TrainConfig(epochs=3, batch_size=16, log_every=1, device="cpu"),
    checkpoint=CheckpointConfig(every_epochs=1, keep_last=10),
    knn=KnnConfig(every_epochs=2, k=5),
)
STEPS = 4  # an epoch: 70 images make 4 whole batches of 16


def changed(**sections: dict[str, object]) -> Config:
    updates = {name: getattr(CONFIG, name).model_copy(update=values) for name, values in sections.items()}
    return CONFIG.model_copy(update=updates)


def run(
    config: Config,
    run_dir: Path,
    *,
    resume: Resume = "never",
    stop_after: int | None = None,
    allow: Sequence[str] = (),
) -> list[Event]:
    """A whole run with its records, or one that is asked to stop after so many steps."""
    asked = itertools.count()
    reports = []
    with Recorder(run_dir) as record:
        for report in pretrain(
            config, run_dir, resume=resume, allow_changes=allow, should_stop=lambda: next(asked) == stop_after
        ):
            record(report)
            reports.append(report)
    return reports


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    return run_dir, run(CONFIG, run_dir)


def test_a_run_tells_what_happens_in_order(finished: tuple[Path, list[Event]]) -> None:
    run_dir, reports = finished
    started, ended = reports[0], reports[-1]
    assert isinstance(started, RunStarted)
    assert (started.images, started.classes, started.steps_per_epoch, started.total_steps) == (70, 10, STEPS, 12)
    assert started.first_step == 0
    assert isinstance(ended, RunEnded)
    assert (ended.step, ended.epoch, ended.reason) == (12, 3.0, "finished")
    steps = [report for report in reports if isinstance(report, TrainingProgress)]
    assert [report.step for report in steps] == list(range(1, 13))
    assert [report.step for report in reports if isinstance(report, KnnEvaluated)] == [8, 12]
    assert [report.step for report in reports if isinstance(report, CheckpointSaved)] == [4, 8, 12]
    for report in steps:
        assert 0 <= report.loss <= 4
        assert report.purity is None or 0 <= report.purity <= 1
        assert report.data_time_ratio + report.bank_time_ratio + report.model_time_ratio == pytest.approx(1)
        assert report.images_per_second > 0
    assert [round(report.bank_fill_ratio, 2) for report in steps[:8]] == [0.16, 0.32, 0.48, 0.64, 0.8, 0.96, 1.0, 1.0]
    assert steps[-1].eta_seconds == 0
    assert ended.checkpoint == run_dir / "checkpoints" / "step-00000012"


def test_the_run_directory_holds_the_config_and_the_records(finished: tuple[Path, list[Event]]) -> None:
    run_dir, reports = finished
    assert load_config(run_dir / "config.yaml") == CONFIG
    assert find_checkpoint(run_dir).config == CONFIG
    lines = metrics(run_dir)
    assert all({"step", "epoch", "loss"} <= line.keys() for line in lines)
    assert [line["loss"] for line in lines if "purity" in line] == [
        r.loss for r in reports if isinstance(r, TrainingProgress)
    ]
    assert [(line["step"], line["knn_accuracy"]) for line in lines if "knn_accuracy" in line] == [
        (report.step, report.accuracy) for report in reports if isinstance(report, KnnEvaluated)
    ]
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("stop_after", [3, 4, 7])
def test_an_interrupted_and_resumed_run_is_the_same_bit_for_bit(
    finished: tuple[Path, list[Event]], tmp_path: Path, stop_after: int
) -> None:
    """Stopped inside an epoch, at its end, and with a bank that has wrapped around."""
    first = run(CONFIG, tmp_path / "run", stop_after=stop_after)
    assert isinstance(first[-1], RunEnded)
    assert (first[-1].reason, first[-1].step) == ("interrupted", stop_after)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:  # what a kill between two checkpoints leaves
        file.write(json.dumps({"step": 11, "epoch": 2.75, "loss": 9.0}) + '\n{"step": 1')
    again = run(CONFIG, tmp_path / "run", resume="auto")
    assert isinstance(again[0], RunStarted)
    assert again[0].first_step == stop_after
    expected, found = tensors(finished[0], 12), tensors(tmp_path / "run", 12)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert metrics(tmp_path / "run") == metrics(finished[0])


def test_a_channels_last_network_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Nets of fewer than 16 channels are contiguous, so the other tests cannot see a buffer restored in that layout."""
    config = changed(model={"backbone": NarrowBackbone(width=16, depths=(1, 1), strides=(2, 2))})
    run(config, tmp_path / "whole", stop_after=6)
    run(config, tmp_path / "stopped", stop_after=3)
    run(config, tmp_path / "stopped", resume="auto", stop_after=3)
    expected, found = tensors(tmp_path / "whole", 6), tensors(tmp_path / "stopped", 6)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_large_batch_recipe_resumes_bit_for_bit(tmp_path: Path) -> None:
    lars = {"kind": "lars", "base_batch_size": 8, "warmup_epochs": 1.5, "schedule": "step"}
    config = changed(train={"accumulate": 3}, optimizer=lars)
    reports = run(config, tmp_path / "whole")
    rates = [report.learning_rate for report in reports if isinstance(report, TrainingProgress)]
    # The batch is twice the base, and the warm-up ends with step 6.
    assert rates[5] == max(rates) == pytest.approx(2 * config.optimizer.learning_rate)
    run(config, tmp_path / "stopped", stop_after=5)
    run(config, tmp_path / "stopped", resume="auto")
    expected, found = tensors(tmp_path / "whole", 12), tensors(tmp_path / "stopped", 12)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_held_images_are_announced_and_change_nothing(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for index in range(20):
        pixels = generator.integers(0, 256, (20 + index, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index:02}.png")
    said = {}
    for rule in ("memory", "auto", "none"):
        data = FolderData(path=tmp_path, cache=rule, workers=0, labels="none")
        said[rule] = run(CONFIG.model_copy(update={"data": data}), tmp_path.with_name(f"{tmp_path.name}-{rule}"))
    needed = sum(3 * 24 * (20 + index) for index in range(20))
    held = {rule: [each for each in reports if isinstance(each, CachingImages)] for rule, reports in said.items()}
    told = [CachingImages(images=20, memory=needed)]
    assert held == {"memory": told, "auto": told, "none": []}
    expected, found = (tensors(tmp_path.with_name(f"{tmp_path.name}-{rule}"), 3) for rule in ("none", "memory"))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_profile_divides_the_time_of_the_steps_that_it_says(tmp_path: Path) -> None:
    reports = list(pretrain(changed(train={"log_every": 100}), tmp_path / "run", profile=3))
    (profiled,) = [report for report in reports if isinstance(report, StepProfiled)]
    assert (profiled.step, profiled.steps, profiled.images, profiled.overlapped) == (11, 3, 16, False)
    parts = {"data", "views", "target", "push", "search", "online", "backward", "optimizer", "reporting"}
    assert profiled.parts.keys() == parts
    assert 0.5 * profiled.seconds < sum(profiled.parts.values()) <= profiled.seconds * 1.001  # the clock's own rounding
    trace = json.loads(gzip.decompress(profiled.trace.read_bytes()))
    named = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert {name: named.count(name) for name in ("target", "search", "backward")} == dict.fromkeys(
        ("target", "search", "backward"), 3
    )
    assert tensors(tmp_path / "run", 12)  # the run went on


def test_a_profile_does_not_change_the_run(finished: tuple[Path, list[Event]], tmp_path: Path) -> None:
    list(pretrain(CONFIG, tmp_path / "run", profile=2))
    expected, found = tensors(finished[0], 12), tensors(tmp_path / "run", 12)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_run_that_is_too_short_for_its_profile_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--profile 5 needs 13 steps .* the run has only 12 left"):
        list(pretrain(CONFIG, tmp_path / "run", profile=5))


@pytest.mark.parametrize("stop_after", [3, 5, 9])
def test_reports_do_not_show_an_interruption(tmp_path: Path, stop_after: int) -> None:
    """Stopped between two reports: the means of the next one are over the same steps as without the stop."""
    config = changed(train={"log_every": 5})
    run(config, tmp_path / "whole")
    run(config, tmp_path / "stopped", stop_after=stop_after)
    run(config, tmp_path / "stopped", resume="auto")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "whole") if "purity" in line] == [4, 5, 8, 10, 12]


def test_a_finished_run_resumes_to_its_end(finished: tuple[Path, list[Event]]) -> None:
    before = metrics(finished[0])
    reports = run(CONFIG, finished[0], resume="auto")
    assert [type(report) for report in reports] == [RunStarted, RunEnded]
    assert metrics(finished[0]) == before


def test_a_run_is_never_overwritten(finished: tuple[Path, list[Event]], tmp_path: Path) -> None:
    run_dir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(UserError, match=r"already contains a run\. Omit --resume never to resume it"):
        run(CONFIG, run_dir)
    with pytest.raises(UserError, match=r"another config \(seed: was 1, now 2; bank.k: was 3, now 4\)"):
        run(changed(bank={"k": 4}).model_copy(update={"seed": 2}), run_dir, resume="auto")
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"contains other files \(thesis.tex\)"):
        run(CONFIG, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        run(CONFIG, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_other_data_than_before_is_refused(finished: tuple[Path, list[Event]], monkeypatch: pytest.MonkeyPatch) -> None:
    from msf_faiss.train import resume

    found = resume.find_newest_valid
    monkeypatch.setattr(resume, "find_newest_valid", lambda *args: (replace(found(*args)[0], dataset_size=71), {}))
    with pytest.raises(UserError, match="had 71 training images, now there are 70"):
        run(CONFIG, finished[0], resume="auto")


def test_a_mistake_in_the_data_leaves_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not fill a batch"):
        run(changed(train={"batch_size": 71}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    config = changed(optimizer={"learning_rate": 1e30}, train={"log_every": 3}, knn={"every_epochs": None})
    with pytest.raises(UserError, match=r"training has diverged. Lower optimizer.learning_rate"):
        run(config, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    # The same when it happens after a good checkpoint: that one stays, and nothing newer appears.
    run(CONFIG, tmp_path / "good", stop_after=5)
    from msf_faiss.train import step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "mean_shift_loss", lambda q, m: (q * float("nan")).sum())
        with pytest.raises(UserError, match="the loss of step 6 is nan"):
            run(CONFIG, tmp_path / "good", resume="auto")
    assert find_checkpoint(tmp_path / "good").step == 5


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the last step before a checkpoint can be finite while its gradient is not."""
    from msf_faiss.train import step

    monkeypatch.setattr(step, "mean_shift_loss", lambda queries, means: (0 * queries).sum().sqrt())
    with pytest.raises(UserError, match=r"the weights of .* are not finite after step 1"):
        run(changed(train={"max_steps": 1}, knn={"every_epochs": None}), tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_losses_are_known_before_anything_is_evaluated_or_saved(tmp_path: Path) -> None:
    reports = run(changed(train={"log_every": 1000}), tmp_path / "run")
    assert [report.step for report in reports if isinstance(report, TrainingProgress)] == [4, 8, 12]
    assert all(isinstance(line["loss"], float) for line in metrics(tmp_path / "run"))
    from msf_faiss.train import step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "mean_shift_loss", lambda queries, means: (queries * float("nan")).sum())
        with pytest.raises(UserError, match="the loss of step 1 is nan"):
            run(changed(train={"log_every": 1000}), tmp_path / "bad")


def test_a_run_that_saves_at_every_chance_saves_each_step_once(tmp_path: Path) -> None:
    """By the clock and by the epoch: neither may save again what the other has saved, nor what a run began from."""
    config = changed(checkpoint={"every_minutes": 1e-9, "keep_last": 100})
    first = run(config, tmp_path / "run", stop_after=5)
    again = run(config, tmp_path / "run", resume="auto")
    saved = [report.step for report in first + again if isinstance(report, CheckpointSaved)]
    assert saved == [*range(6), *range(6, 13)]


def test_max_steps_ends_early_with_the_schedule_of_the_whole(
    finished: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    reports = run(changed(train={"max_steps": 6}), tmp_path / "run")
    assert isinstance(reports[-1], RunEnded)
    assert (reports[-1].step, reports[-1].reason) == (6, "finished")
    rates = [report.learning_rate for report in reports if isinstance(report, TrainingProgress)]
    assert rates == [r.learning_rate for r in finished[1] if isinstance(r, TrainingProgress)][:6]


def test_a_run_may_be_left_in_the_middle(tmp_path: Path) -> None:
    reports = list(itertools.islice(pretrain(CONFIG, tmp_path / "run"), 3))
    assert [type(report) for report in reports] == [RunStarted, TrainingProgress, TrainingProgress]
    run(CONFIG, tmp_path / "run")  # nothing was saved, so nothing is lost by starting anew


def test_training_never_sees_labels(finished: tuple[Path, list[Event]], tmp_path: Path) -> None:
    """The same weights, bit for bit, when every label is another."""

    from msf_faiss.train import trainer as train

    opened = train.open_source

    class Relabelled:
        def __init__(self, source: object) -> None:
            self._source = source
            self.labels, self.classes = None, None

        def __getattr__(self, name: str) -> object:
            return getattr(self._source, name)

        def __len__(self) -> int:
            return len(self._source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "open_source", lambda data, split: Relabelled(opened(data, split)))
        reports = run(CONFIG, tmp_path / "run")
    assert isinstance(reports[0], RunStarted)
    assert reports[0].classes is None
    assert all(report.purity is None for report in reports if isinstance(report, TrainingProgress))
    assert not any(isinstance(report, KnnEvaluated) for report in reports)
    expected, found = tensors(finished[0], 12), tensors(tmp_path / "run", 12)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_bfloat16_and_the_reference_bank_train_too(tmp_path: Path) -> None:
    bank = ReferenceBankConfig(capacity=100, k=3, dtype="bfloat16")
    config = changed(train={"precision": "bfloat16", "max_steps": 3}).model_copy(update={"bank": bank})
    assert isinstance(run(config, tmp_path / "run")[-1], RunEnded)


@pytest.mark.parametrize(
    ("bank", "kept", "told"),
    [
        (ReferenceBankConfig(capacity=100, k=3), 100, "bank.kind: was flat, now reference"),
        (FlatBankConfig(capacity=100, k=3, dtype="bfloat16"), 100, "bank.dtype: was float32, now bfloat16"),
        (FlatBankConfig(capacity=37, k=3), 37, "bank.capacity: was 100, now 37"),
        (FlatBankConfig(capacity=300, k=3), 100, "bank.capacity: was 100, now 300"),
        (FlatBankConfig(capacity="dataset", k=3), 70, "bank.capacity: was 100, now dataset"),
        (FlatBankConfig(capacity=100, k=3, max_age=40), 100, "bank.max_age: was null, now 40"),
        (
            ReferenceBankConfig(capacity=50, k=3, dtype="float16"),
            50,
            "bank.capacity: was 100, now 50; bank.dtype: was float32, now float16; bank.kind: was flat, now reference",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_goes_on_with_another_bank(
    finished: tuple[Path, list[Event]],
    tmp_path: Path,
    bank: FlatBankConfig | ReferenceBankConfig,
    kept: int,
    told: str,
) -> None:
    """Stopped with a bank that has wrapped around: the newest entries move, in order, and the run says so."""
    run(CONFIG, tmp_path / "run", stop_after=9)
    before = tensors(tmp_path / "run", 9)
    config = CONFIG.model_copy(update={"bank": bank})
    state = TrainState.create(config, torch.device("cpu"), images=70)
    state.restore(find_checkpoint(tmp_path / "run"))
    newest = torch.arange(kept)  # ages
    slots, old_slots = (state.bank.pushed - 1 - newest) % state.bank.capacity, (9 * 16 - 1 - newest) % 100
    assert len(state.bank) == kept
    assert torch.equal(state.bank.ids(slots), before["bank.ids"][old_slots])
    entries = before["bank.embeddings"][old_slots].to(state.bank.dtype).float()
    assert torch.equal(state.bank.reconstruct(slots), entries)
    reports = run(config, tmp_path / "run", resume="auto", allow=["bank"])
    assert isinstance(reports[0], RunStarted)
    assert reports[0].notes == (
        *(f"config changed: {text}" for text in told.split("; ")),
        f"the bank kept the newest {kept} entries",
    )
    assert isinstance(reports[-1], RunEnded)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert find_checkpoint(tmp_path / "run").config == config
    if told == "bank.kind: was flat, now reference":  # the same neighbours, so the same run
        expected, found = tensors(finished[0], 12), tensors(tmp_path / "run", 12)
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    # From here on it is that run, and there is nothing to tell.
    again = run(config, tmp_path / "run", resume="auto", allow=["bank"])
    assert isinstance(again[0], RunStarted)
    assert again[0].notes == ()


def test_another_bank_must_find_as_many_neighbours(tmp_path: Path) -> None:
    """k is part of the loss, not of the bank."""
    run(CONFIG, tmp_path / "run", stop_after=5)
    written = (tmp_path / "run" / "config.yaml").read_text()
    config = CONFIG.model_copy(update={"bank": ReferenceBankConfig(capacity=50, k=4)})
    with pytest.raises(UserError, match=r"another config \(bank.k: was 3, now 4\)\. .* --allow-config-change bank.k,"):
        run(config, tmp_path / "run", resume="auto", allow=["bank.capacity", "bank.kind"])
    assert (tmp_path / "run" / "config.yaml").read_text() == written


def test_a_bank_that_is_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    bank = FlatBankConfig(capacity="900TiB", k=3)
    with pytest.raises(UserError, match=r"bank.capacity: .* entries of 40 bytes take 921,600.0 GiB, and cpu has"):
        run(CONFIG.model_copy(update={"bank": bank}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bank_of_the_size_of_the_data_set_trains(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"bank": FlatBankConfig(capacity="dataset", k=3)})
    reports = run(config, tmp_path / "run")
    assert isinstance(reports[0], RunStarted)
    assert "70 entries" in reports[0].bank
    assert tensors(tmp_path / "run", 12)["bank.embeddings"].shape == (70, 8)
    assert len(load_bank(find_checkpoint(tmp_path / "run"), torch.device("cpu"))) == 70


def test_engines_are_timed_only_where_one_is_to_be_chosen(finished: tuple[Path, list[Event]], tmp_path: Path) -> None:
    assert isinstance(finished[1][0], RunStarted)
    assert finished[1][0].engine_ms.keys() == {"faiss", "torch"}
    assert next(iter(finished[1][0].engine_ms)) in finished[1][0].bank
    started = next(iter(pretrain(changed(bank={"engine": "faiss"}), tmp_path / "run")))
    assert isinstance(started, RunStarted)
    assert started.engine_ms == {}
    assert "engine faiss" in started.bank
    with pytest.raises(UserError, match="bank: there is no engine streams on cpu; there are faiss, torch"):
        next(iter(pretrain(changed(bank={"engine": "streams"}), tmp_path / "streams")))


class Forgetful(ReferenceBank):
    """Loses the second neighbour of each query, until it is told to improve."""

    losing = True

    def search_exactly(self, queries: torch.Tensor, k: int) -> Neighbors:
        return super()._search(queries, min(k, self.searchable))

    def _search(self, queries: torch.Tensor, k: int) -> Neighbors:
        found = super()._search(queries, k)
        if self.losing and k > 2:
            worst = super()._search(queries, self.searchable)
            found.slots[:, 1], found.similarities[:, 1] = worst.slots[:, -1], worst.similarities[:, -1]
        return found

    def raise_recall(self) -> str:
        self.losing = False
        return "it pulled itself together"

    def metrics(self) -> dict[str, float]:
        return {"lost": float(self.losing)}

    def _index_state(self) -> dict[str, torch.Tensor]:
        return {"losing": torch.tensor(self.losing)}

    def _load_index(self, state: dict[str, torch.Tensor]) -> None:
        self.losing = bool(state["losing"])


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Config:
    """A config whose approximate bank is that one; it is checked every five steps."""
    from msf_faiss.train import state

    monkeypatch.setattr(state, "create_bank", lambda config, *, dim, **rest: Forgetful(RingSpec(config.capacity, dim)))
    bank = ScanBankConfig(
        capacity=100, k=3, scan="int8", min_recall=0.9, recall_check=RecallCheckConfig(every_steps=5, queries=8)
    )
    return changed(train={"log_every": 4}).model_copy(update={"bank": bank})


def test_a_bank_below_its_promise_improves_and_the_run_says_so(forgetful: Config, tmp_path: Path) -> None:
    reports = run(forgetful, tmp_path / "run")
    improved = [report for report in reports if isinstance(report, BankAdjusted)]
    assert [(report.step, report.epoch) for report in improved] == [(5, 1.25)]
    text = improved[0].text
    assert text == "recall 0.500 is below 0.9: it pulled itself together"
    steps = {report.step: report for report in reports if isinstance(report, TrainingProgress)}
    assert list(steps) == [4, 5, 8, 12]
    assert [(report.recall_at_k, report.bank_metrics) for report in steps.values()] == [
        (None, {"lost": 1.0}),
        (None, {"lost": 0.0}),  # what was counted is about the bank as it was
        (None, {"lost": 0.0}),
        (1.0, {"lost": 0.0}),
    ]
    assert reports.index(improved[0]) == reports.index(steps[5]) + 1
    lines = metrics(tmp_path / "run")
    assert [line for line in lines if "bank_adjusted" in line] == [
        {"step": 5, "epoch": 1.25, "loss": steps[5].loss, "bank_adjusted": text}
    ]
    assert [line["bank_lost"] for line in lines if "purity" in line] == [1, 0, 0, 0]
    assert all({"neighbor_age_p95", "hubness", "recall_at_k"} <= line.keys() for line in lines if "purity" in line)


@pytest.mark.parametrize("stop_after", [3, 4, 5, 6, 10])
def test_an_interruption_does_not_change_what_the_watch_sees(
    forgetful: Config, tmp_path: Path, stop_after: int
) -> None:
    """What it has counted, and what the bank has become, are in the checkpoint."""
    run(forgetful, tmp_path / "whole")
    run(forgetful, tmp_path / "stopped", stop_after=stop_after)
    run(forgetful, tmp_path / "stopped", resume="auto")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    expected, found = tensors(tmp_path / "whole", 12), tensors(tmp_path / "stopped", 12)
    assert "monitor.recall.counts" in expected
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


RECALL_CHECK = RecallCheckConfig(every_steps=5, queries=8)
INDEXED = {
    "bf16": ScanBankConfig(capacity=100, k=3, scan="bf16"),
    "int8": ScanBankConfig(capacity=100, k=3, scan="int8", min_recall=0.5, recall_check=RECALL_CHECK),
    "pq": ScanBankConfig(capacity=100, k=3, scan="pq", min_recall=0.5, recall_check=RECALL_CHECK),
    "ivf": IvfBankConfig(
        capacity=100, k=3, ivf=IvfConfig(lists=4, probes=2), min_recall=0.5, recall_check=RECALL_CHECK
    ),
    "ivf segments=2": IvfBankConfig(
        capacity=100, k=3, ivf=IvfConfig(lists=4, probes=2, segments=2), min_recall=0.5, recall_check=RECALL_CHECK
    ),
}


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Create scanning banks that do not compare most of a hundred entries; the number of queries of each scan."""
    from msf_faiss.train import state

    # FAISS trains 4-bit codes on no fewer than 16 entries.
    limits = ScanLimits(newest=4, group=2, first_groups=1, most_groups=1, training=16)
    queries: list[int] = []

    def create(config: BankConfig, *, dim: int, **rest: object) -> Bank:
        if config.kind != "scan":
            return create_bank(config, dim=dim, **rest)  # type: ignore[arg-type]
        bank = SCAN_BANKS[config.scan](RingSpec(config.capacity, dim), limits=limits)
        if isinstance(bank, ApproximateScanBank):
            scan = bank._scan
            bank._scan = lambda *arguments: queries.append(len(arguments[0])) or scan(*arguments)
        return bank

    monkeypatch.setattr(state, "create_bank", create)
    return queries


@pytest.mark.parametrize("name", INDEXED)
def test_a_run_with_an_index_records_it_and_resumes_bit_for_bit(scanned: list[int], tmp_path: Path, name: str) -> None:
    """Stopped while lists are learnt, while they take in what the bank holds, and when they have followed it round."""
    config = changed(knn={"every_epochs": None}).model_copy(update={"bank": INDEXED[name]})
    run(config, tmp_path / "whole")
    lines = metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [round(line["bank_fill_ratio"], 2) for line in lines[:7]] == [0.16, 0.32, 0.48, 0.64, 0.8, 0.96, 1.0]
    assert [line["recall_at_k"] is None for line in lines] == [name == "bf16" or step < 5 for step in range(1, 13)]
    assert all(name == "bf16" or 0.5 <= line["recall_at_k"] <= 1 for line in lines[4:])
    assert all(0 < line["neighbor_age_mean"] <= line["neighbor_age_p95"] < 100 for line in lines[2:])
    if name == "bf16":
        assert lines[0]["bank_proved_ratio"] == 1  # nothing is left out of few entries
        assert all(0 <= line["bank_proved_ratio"] <= 1 for line in lines)
        assert any(line["bank_proved_ratio"] < 1 for line in lines)
    elif config.bank.kind == "scan":
        assert scanned == [16] * 11  # in the first step, the whole bank is compared
    else:
        assert [line["bank_exact_ratio"] for line in (lines[0], lines[-1])] == [1, 0]
        assert "bank_probes" not in lines[0]
        assert lines[-1]["bank_probes"] == 2
        assert 1 <= lines[-1]["bank_list_imbalance"] < 4
    expected = tensors(tmp_path / "whole", 12)
    assert any(key.startswith("bank.index.") for key in expected)
    for stop_after in (3, 5, 10):
        run(config, tmp_path / f"{stop_after}", stop_after=stop_after)
        run(config, tmp_path / f"{stop_after}", resume="auto")
        found = tensors(tmp_path / f"{stop_after}", 12)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
        assert metrics(tmp_path / f"{stop_after}") == lines


@pytest.mark.parametrize("name", INDEXED)
def test_a_run_goes_on_with_an_index(scanned: list[int], tmp_path: Path, name: str) -> None:
    run(CONFIG, tmp_path / "run", stop_after=9)
    config = CONFIG.model_copy(update={"bank": INDEXED[name]})
    reports = run(config, tmp_path / "run", resume="auto", allow=["bank.kind"])
    assert isinstance(reports[0], RunStarted)
    kind = INDEXED[name].kind
    assert reports[0].notes == (
        f"config changed: bank.kind: flat there, {kind} now",
        "the bank kept the newest 100 entries",
    )
    steps = [report for report in reports if isinstance(report, TrainingProgress)]
    assert [report.step for report in steps] == [10, 11, 12]
    assert all(report.bank_fill_ratio == 1 for report in steps)
    if kind == "ivf":
        assert "4 lists, 2 probed" in reports[0].bank
        assert all(report.bank_metrics["exact_ratio"] == 0 for report in steps)
    elif name != "bf16":
        assert scanned == [16] * 3
    assert isinstance(reports[-1], RunEnded)
    assert find_checkpoint(tmp_path / "run").config == config


def test_a_collapse_is_told_once_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msf_faiss.train import progress

    measured = progress.measure_spread
    low = iter(range(1, 100))
    monkeypatch.setattr(
        progress, "measure_spread", lambda rows: Spread(0.01, 9.0) if next(low) >= 4 else measured(rows)
    )
    first = run(CONFIG, tmp_path / "run", stop_after=5)
    reports = first + run(CONFIG, tmp_path / "run", resume="auto")
    told = [report for report in reports if isinstance(report, CollapseDetected)]
    assert [(report.step, report.since, report.embedding_std) for report in told] == [(6, 4, 0.01)]
    assert [line["step"] for line in metrics(tmp_path / "run") if "collapse" in line] == [6]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["collapsing_since"] == 4
