"""Profiles of a run."""

import gzip
import json
from pathlib import Path

import pytest
from runs import assert_same_tensors, tensors
from small_runs import CONFIG, changed

from msf_faiss.errors import UserError
from msf_faiss.run.events import Event, StepProfiled
from msf_faiss.train.trainer import pretrain


def test_profile_attributes_the_time_of_its_steps(tmp_path: Path) -> None:
    events = list(pretrain(changed(train={"log_every": 100}), tmp_path / "run", profile=3))
    (profiled,) = [event for event in events if isinstance(event, StepProfiled)]
    assert (profiled.step, profiled.steps, profiled.images, profiled.overlapped) == (11, 3, 16, False)
    parts = {"data", "views", "target", "push", "search", "online", "backward", "optimizer", "reporting"}
    assert profiled.parts.keys() == parts
    assert 0.5 * profiled.seconds < sum(profiled.parts.values()) <= profiled.seconds * 1.001  # rounding
    trace = json.loads(gzip.decompress(profiled.trace.read_bytes()))
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert {name: names.count(name) for name in ("target", "search", "backward")} == dict.fromkeys(
        ("target", "search", "backward"), 3
    )
    assert tensors(tmp_path / "run", 12)  # training continued


def test_profile_changes_no_bit(finished: tuple[Path, list[Event]], tmp_path: Path) -> None:
    list(pretrain(CONFIG, tmp_path / "run", profile=2))
    assert_same_tensors(tmp_path / "run", finished[0], 12)


def test_profile_needs_enough_steps(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--profile 5 needs 13 steps .* the run has only 12 left"):
        list(pretrain(CONFIG, tmp_path / "run", profile=5))
