"""Checkpoints of a run, and resuming from them bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import assert_same_tensors, metrics, tensors
from small_runs import CONFIG, changed, run

from msf_faiss.bank import Bank, RingSpec, create_bank
from msf_faiss.bank.scan import SCAN_BANKS, ScanLimits
from msf_faiss.bank.scan.base import ApproximateScanBank
from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.config import (
    BankConfig,
    FlatBankConfig,
    IvfBankConfig,
    IvfConfig,
    NarrowBackbone,
    RecallCheckConfig,
    ReferenceBankConfig,
    ScanBankConfig,
)
from msf_faiss.config.load import load_config
from msf_faiss.errors import UserError
from msf_faiss.run.events import CheckpointSaved, Event, RunEnded, RunStarted, TrainingProgress
from msf_faiss.train.state import TrainState


@pytest.mark.parametrize("stop_after", [3, 4, 7])
def test_interrupted_run_resumes_bit_for_bit(
    finished: tuple[Path, list[Event]], tmp_path: Path, stop_after: int
) -> None:
    """Stopped inside an epoch, at its end, and with a bank that has wrapped around."""
    first = run(CONFIG, tmp_path / "run", stop_after=stop_after)
    assert isinstance(first[-1], RunEnded)
    assert (first[-1].reason, first[-1].step) == ("interrupted", stop_after)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:  # as after a kill between two checkpoints
        file.write(json.dumps({"step": 11, "epoch": 2.75, "loss": 9.0}) + '\n{"step": 1')
    again = run(CONFIG, tmp_path / "run", resume="auto")
    assert isinstance(again[0], RunStarted)
    assert again[0].first_step == stop_after
    assert_same_tensors(tmp_path / "run", finished[0], 12)
    assert metrics(tmp_path / "run") == metrics(finished[0])


def test_channels_last_network_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Networks of fewer than 16 channels are contiguous, so other tests miss a momentum buffer in the wrong layout."""
    config = changed(model={"backbone": NarrowBackbone(width=16, depths=(1, 1), strides=(2, 2))})
    run(config, tmp_path / "whole", stop_after=6)
    run(config, tmp_path / "stopped", stop_after=3)
    run(config, tmp_path / "stopped", resume="auto", stop_after=3)
    assert_same_tensors(tmp_path / "stopped", tmp_path / "whole", 6)


def test_large_batch_recipe_resumes_bit_for_bit(tmp_path: Path) -> None:
    lars = {"kind": "lars", "base_batch_size": 8, "warmup_epochs": 1.5, "schedule": "step"}
    config = changed(train={"accumulate": 3}, optimizer=lars)
    events = run(config, tmp_path / "whole")
    rates = [event.learning_rate for event in events if isinstance(event, TrainingProgress)]
    # The batch is twice the base, and the warm-up ends with step 6.
    assert rates[5] == max(rates) == pytest.approx(2 * config.optimizer.learning_rate)
    run(config, tmp_path / "stopped", stop_after=5)
    run(config, tmp_path / "stopped", resume="auto")
    assert_same_tensors(tmp_path / "stopped", tmp_path / "whole", 12)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("stop_after", [3, 5, 9])
def test_interruption_does_not_change_metrics(tmp_path: Path, stop_after: int) -> None:
    """Stopped between two progress events: the next one covers the same steps as without the stop."""
    config = changed(train={"log_every": 5})
    run(config, tmp_path / "whole")
    run(config, tmp_path / "stopped", stop_after=stop_after)
    run(config, tmp_path / "stopped", resume="auto")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "whole") if "purity" in line] == [4, 5, 8, 10, 12]


def test_resuming_a_finished_run_does_nothing(finished: tuple[Path, list[Event]]) -> None:
    before = metrics(finished[0])
    events = run(CONFIG, finished[0], resume="auto")
    assert [type(event) for event in events] == [RunStarted, RunEnded]
    assert metrics(finished[0]) == before


def test_resume_refuses_other_data(finished: tuple[Path, list[Event]], monkeypatch: pytest.MonkeyPatch) -> None:
    from msf_faiss.train import resume

    found = resume.find_newest_valid
    monkeypatch.setattr(resume, "find_newest_valid", lambda *args: (replace(found(*args)[0], dataset_size=71), {}))
    with pytest.raises(UserError, match="there were 71 training images, now there are 70"):
        run(CONFIG, finished[0], resume="auto")


def test_non_finite_weights_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the last step before a checkpoint can be finite while its gradient is not."""
    from msf_faiss.train import step

    monkeypatch.setattr(step, "mean_shift_loss", lambda queries, means: (0 * queries).sum().sqrt())
    with pytest.raises(UserError, match=r"the weights of .* are not finite after step 1"):
        run(changed(train={"max_steps": 1}, knn={"every_epochs": None}), tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_each_step_is_saved_once(tmp_path: Path) -> None:
    """Due by the clock and by the epoch, at the same step, and at the step of the checkpoint to resume from."""
    config = changed(checkpoint={"every_minutes": 1e-9, "keep_last": 100})
    first = run(config, tmp_path / "run", stop_after=5)
    again = run(config, tmp_path / "run", resume="auto")
    saved = [event.step for event in first + again if isinstance(event, CheckpointSaved)]
    assert saved == [*range(6), *range(6, 13)]


@pytest.mark.parametrize(
    ("bank", "kept", "changes"),
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
def test_resume_with_another_bank_keeps_the_newest_entries(
    finished: tuple[Path, list[Event]],
    tmp_path: Path,
    bank: FlatBankConfig | ReferenceBankConfig,
    kept: int,
    changes: str,
) -> None:
    """Stopped with a bank that has wrapped around: its newest entries move, in order."""
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
    events = run(config, tmp_path / "run", resume="auto", allow=["bank"])
    assert isinstance(events[0], RunStarted)
    assert events[0].notes == (
        *(f"config changed: {text}" for text in changes.split("; ")),
        f"the bank kept the newest {kept} entries",
    )
    assert isinstance(events[-1], RunEnded)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert find_checkpoint(tmp_path / "run").config == config
    if changes == "bank.kind: was flat, now reference":  # the same neighbours, so the same run
        assert_same_tensors(tmp_path / "run", finished[0], 12)
    # From here on, the new bank is the bank of the run.
    again = run(config, tmp_path / "run", resume="auto", allow=["bank"])
    assert isinstance(again[0], RunStarted)
    assert again[0].notes == ()


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
    """Create scanning banks that scan a hundred entries; returns the number of queries of each scan."""
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
def test_run_with_an_index_resumes_bit_for_bit(scanned: list[int], tmp_path: Path, name: str) -> None:
    """Stopped before, at and after the step at which the bank has wrapped around."""
    config = changed(knn={"every_epochs": None}).model_copy(update={"bank": INDEXED[name]})
    run(config, tmp_path / "whole")
    lines = metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [round(line["bank_fill_ratio"], 2) for line in lines[:7]] == [0.16, 0.32, 0.48, 0.64, 0.8, 0.96, 1.0]
    assert [line["recall_at_k"] is None for line in lines] == [name == "bf16" or step < 5 for step in range(1, 13)]
    assert all(name == "bf16" or 0.5 <= line["recall_at_k"] <= 1 for line in lines[4:])
    assert all(0 < line["neighbor_age_mean"] <= line["neighbor_age_p95"] < 100 for line in lines[2:])
    if name == "bf16":
        assert lines[0]["bank_proved_ratio"] == 1  # few entries are all compared
        assert all(0 <= line["bank_proved_ratio"] <= 1 for line in lines)
        assert any(line["bank_proved_ratio"] < 1 for line in lines)
    elif config.bank.kind == "scan":
        assert scanned == [16] * 11  # in the first step, the whole bank is compared
    else:
        assert [line["bank_exact_ratio"] for line in (lines[0], lines[-1])] == [1, 0]
        assert "bank_probes" not in lines[0]
        assert lines[-1]["bank_probes"] == 2
        assert 1 <= lines[-1]["bank_list_imbalance"] < 4
    assert any(key.startswith("bank.index.") for key in tensors(tmp_path / "whole", 12))
    for stop_after in (3, 5, 10):
        run(config, tmp_path / f"{stop_after}", stop_after=stop_after)
        run(config, tmp_path / f"{stop_after}", resume="auto")
        assert_same_tensors(tmp_path / f"{stop_after}", tmp_path / "whole", 12)
        assert metrics(tmp_path / f"{stop_after}") == lines


@pytest.mark.parametrize("name", INDEXED)
def test_resume_with_an_index_instead_of_a_flat_bank(scanned: list[int], tmp_path: Path, name: str) -> None:
    run(CONFIG, tmp_path / "run", stop_after=9)
    config = CONFIG.model_copy(update={"bank": INDEXED[name]})
    events = run(config, tmp_path / "run", resume="auto", allow=["bank.kind"])
    assert isinstance(events[0], RunStarted)
    kind = INDEXED[name].kind
    assert events[0].notes == (
        f"config changed: bank.kind: was flat, now {kind}",
        "the bank kept the newest 100 entries",
    )
    steps = [event for event in events if isinstance(event, TrainingProgress)]
    assert [event.step for event in steps] == [10, 11, 12]
    assert all(event.bank_fill_ratio == 1 for event in steps)
    if kind == "ivf":
        assert "4 lists, 2 probed" in events[0].bank
        assert all(event.bank_metrics["exact_ratio"] == 0 for event in steps)
    elif name != "bf16":
        assert scanned == [16] * 3
    assert isinstance(events[-1], RunEnded)
    assert find_checkpoint(tmp_path / "run").config == config
