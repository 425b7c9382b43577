"""What a run looks like, in a terminal and in a pipe."""

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from msf_faiss_cli.console import TrainingDisplay
from rich.console import Console

from msf_faiss.run.events import BankAdjusted, CachingImages, Event, RunStarted, StepProfiled, TrainingProgress

STARTED = RunStarted(
    run_dir=Path("runs/one"),
    device="cpu (1 threads)",
    images=4000,
    classes=None,
    parameters=1_500_000,
    feature_dim=128,
    embedding_dim=32,
    bank="FlatBank(0 of 1,000 entries, dim 32, torch.float32, cpu, engine torch)",
    engine_ms={"torch": 1.234, "faiss": 20.5},
    notes=("the bank is another one", "and so is the moon"),
    steps_per_epoch=10,
    total_steps=50,
    first_step=5,
)
STEP = TrainingProgress(
    step=6,
    epoch=0.6,
    loss=1.25,
    purity=None,
    learning_rate=0.05,
    ema_momentum=0.99,
    bank_fill_ratio=0.5,
    neighbor_age_mean=1234.5,
    neighbor_age_p95=4321.0,
    hubness=0.034,
    recall_at_k=0.98765,
    embedding_std=0.876,
    effective_rank=25.4,
    collapsing_since=None,
    push_ms=0.1234,
    search_ms=12.345,
    bank_metrics={"list_imbalance": 1.5, "proved_ratio": 1.0},
    images_per_second=2000.0,
    data_time_ratio=0.1,
    bank_time_ratio=0.2,
    model_time_ratio=0.7,
    eta_seconds=61,
    unreadable_images=0,
)


def shown(reports: Sequence[Event], *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None, soft_wrap=True)
    with TrainingDisplay(console) as display:
        for report in reports:
            display(report)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_bank_is_shown_with_its_engine_and_what_is_new_about_it(terminal: bool) -> None:
    text = shown([STARTED], terminal=terminal)
    assert "bank     FlatBank(0 of 1,000 entries, dim 32, torch.float32, cpu, engine torch)" in text
    assert "engine   torch, the fastest here (torch 1.23 ms, faiss 20.5 ms a search)" in text
    assert "note     the bank is another one" in text
    assert "note     and so is the moon" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_each_report_shows_what_the_bank_knows_about_itself(terminal: bool) -> None:
    words = shown([STARTED, STEP], terminal=terminal).split()
    for word in ("full", "push", "search", "recall", "age", "95", "hubs", "list", "imbalance", "proved", "ratio"):
        assert word in words
    for value in ("50%", "0.123", "12.3", "0.988", "1,234", "4,321", "3.4%", "1.5"):
        assert value in words


def test_a_line_in_a_pipe_holds_everything() -> None:
    assert shown([STARTED, STEP], terminal=False).splitlines()[-1] == (
        "step 6  epoch 0.60/5  loss 1.2500  purity –  images/s 2,000  left 1:01  data 10%  bank 20%  model 70%  "
        "spread 0.88  rank 25  |  "
        "bank: full 50%  push 0.123 ms  search 12.3 ms  recall 0.988  age 1,234  95 % 4,321  hubs 3.4%  "
        "list imbalance 1.5  proved 1"
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_an_improvement_is_told_in_a_line_that_stays(terminal: bool) -> None:
    improved = BankAdjusted(step=1200, epoch=1.2, text="recall 0.900 is below 0.95: 32 probes instead of 16")
    text = shown([STARTED, STEP, improved], terminal=terminal)
    assert "step 1,200: bank: recall 0.900 is below 0.95: 32 probes instead of 16" in text


@pytest.mark.parametrize("beside", [False, True])
def test_a_profile_is_a_table_that_adds_up(beside: bool) -> None:
    parts = {"data": 0.01, "search": 0.02, "push": 0.005, "online": 0.03, "backward": 0.05, "a new part": 1.0}
    profiled = StepProfiled(
        step=20,
        epoch=2.0,
        steps=4,
        seconds=0.2,
        parts=parts,
        overlapped=beside,
        images=100,
        trace=Path("a/trace.json.gz"),
    )
    lines = [line.split() for line in shown([STARTED, profiled], terminal=False).splitlines()]
    assert ["profile", "of", "4", "steps;", "a", "trace", "of", "later", "ones:", "a/trace.json.gz"] in lines
    assert ["data", "wait", "10", "5.0%"] in lines
    assert ["online", "forward", "30", "15.0%"] in lines
    note = ["(beside", "the", "online", "forward)"] if beside else []
    assert ["search", *note, "20", "10.0%"] in lines
    assert ["everything", "else", "110", "55.0%"] if beside else ["everything", "else", "85", "42.5%"] in lines
    assert ["step", "200", "500", "images/s"] in lines


def test_held_images_are_told_with_their_size() -> None:
    assert "cache    50,000 images are decoded and held, 154 MB" in shown(
        [STARTED, CachingImages(images=50_000, memory=153_600_000)], terminal=False
    )
    assert "cache    none: " in shown([STARTED, CachingImages(images=50_000, memory=0)], terminal=False)
