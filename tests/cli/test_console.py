"""How a run is shown, in a terminal and in a pipe."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from msf_faiss_cli.console import TrainingDisplay
from rich.console import Console
from sample_events import PROGRESS, STARTED

from msf_faiss.run.events import BankAdjusted, CachingImages, Event, KnnEvaluated, StepProfiled, TimeEstimated


def shown(events: Sequence[Event], *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None, soft_wrap=True)
    with TrainingDisplay(console) as display:
        for event in events:
            display(event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_start_shows_engines_and_notes(terminal: bool) -> None:
    text = shown([STARTED], terminal=terminal)
    assert "bank     FlatBank(0 of 1,000 entries, dim 32, torch.float32, cpu, engine torch)" in text
    assert "engine   torch, the fastest on this machine (torch 1.23 ms, faiss 20.5 ms per search)" in text
    assert "note     the bank is another one" in text
    assert "note     and so is the moon" in text


LINES = [
    "epoch 0.60/5 · loss 1.2500 · 2,000 img/s · ETA 1:01",
    "time: data 10%, bank 20%, model 70% · embedding std 0.88, effective rank 25",
    "bank 50% full · push 0.123 ms, search 12.3 ms · recall@k 0.988 · age 1,234 (p95 4,321) · hubness 3.4% · "
    "list imbalance 1.5 · proved ratio 1",
]


def test_progress_is_one_line_in_a_pipe() -> None:
    assert shown([STARTED, PROGRESS], terminal=False).splitlines()[-1] == " · ".join(["step 6/50", *LINES])
    labelled = replace(PROGRESS, purity=0.25, unreadable_images=1_234)
    text = shown([STARTED, labelled], terminal=False)
    assert "loss 1.2500 · purity 0.250 · 2,000 img/s" in text
    assert "ETA 1:01 · 1,234 unreadable images skipped · time" in text


def test_progress_is_live_in_a_terminal() -> None:
    text = shown([STARTED, PROGRESS], terminal=True)
    assert "6/50" in text
    assert all(line in text for line in LINES)


@pytest.mark.parametrize("terminal", [False, True])
def test_estimate_is_a_line_that_stays(terminal: bool) -> None:
    estimated = TimeEstimated(step=2, images_per_second=4.25, eta_seconds=40_000)
    assert "time     about 11:06:40 (4.25 img/s, from one step)" in shown([STARTED, estimated], terminal=terminal)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bank_adjustment_is_a_line_that_stays(terminal: bool) -> None:
    adjusted = BankAdjusted(step=1200, epoch=1.2, text="recall 0.900 is below 0.95: 32 probes instead of 16")
    text = shown([STARTED, PROGRESS, adjusted], terminal=terminal)
    assert "step 1,200: bank: recall 0.900 is below 0.95: 32 probes instead of 16" in text


def test_knn_accuracy_is_shown_beside_that_of_the_untrained_network() -> None:
    event = KnnEvaluated(step=0, epoch=0.0, k=20, accuracy=0.371, leave_one_out=False, seconds=1.0, untrained=0.371)
    worse = replace(event, step=120, epoch=12.0, accuracy=0.346, best=0.346, best_step=120, warning="it is below")
    lines = shown([replace(STARTED, evaluates_untrained=True), event, worse], terminal=False).splitlines()
    assert "kNN      evaluating the untrained network first, for comparison" in lines
    assert lines[-3:] == [
        "epoch 0: 20-NN accuracy 37.1%, untrained",
        "epoch 12: 20-NN accuracy 34.6% (untrained 37.1%)",
        "warning: step 120: it is below",
    ]


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_profile_is_a_table_that_adds_up(overlapped: bool) -> None:
    parts = {"data": 0.01, "search": 0.02, "push": 0.005, "online": 0.03, "backward": 0.05, "a new part": 1.0}
    profiled = StepProfiled(
        step=20,
        epoch=2.0,
        steps=4,
        seconds=0.2,
        parts=parts,
        overlapped=overlapped,
        images=100,
        trace=Path("a/trace.json.gz"),
    )
    text = shown([STARTED, profiled], terminal=False)
    assert "profile of 4 steps; trace of three later steps: a/trace.json.gz" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["data", "wait", "10", "5.0%"] in lines
    assert ["online", "forward", "30", "15.0%"] in lines
    note = ["(overlaps", "the", "online", "forward)"] if overlapped else []
    assert ["search", *note, "20", "10.0%"] in lines
    rest = ["110", "55.0%"] if overlapped else ["85", "42.5%"]
    assert ["everything", "else", *rest] in lines
    assert ["step", "200", "500", "img/s"] in lines


def test_caching_images_shows_the_memory() -> None:
    assert "cache    decoding 50,000 images into 154 MB of memory" in shown(
        [STARTED, CachingImages(images=50_000, memory=153_600_000)], terminal=False
    )
    assert "cache    none: " in shown([STARTED, CachingImages(images=50_000, memory=0)], terminal=False)
