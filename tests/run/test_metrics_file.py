"""metrics.jsonl of a new run, of a resumed one, and of another format version."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sample_events import PROGRESS, STARTED

from msf_faiss.errors import UserError
from msf_faiss.run.metrics_file import HEADER, METRICS, MetricsWriter


def write(path: Path, first_step: int, steps: range) -> list[int]:
    """Steps of the lines after a run from `first_step`."""
    writer = MetricsWriter(path)
    writer(replace(STARTED, first_step=first_step))
    for step in steps:
        writer(replace(PROGRESS, step=step))
    header, *lines = path.read_text().splitlines(keepends=True)
    assert header == HEADER
    return [json.loads(line)["step"] for line in lines]


def test_a_resumed_run_drops_lines_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    assert write(path, 0, range(1, 6)) == [1, 2, 3, 4, 5]
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # the process was killed
    assert write(path, 3, range(4, 6)) == [1, 2, 3, 4, 5]
    assert write(path, 0, range(1, 2)) == [1]  # nothing to resume: starts over
    path.unlink()
    assert write(path, 3, range(4, 5)) == [4]  # started from the checkpoint of another run


def test_resuming_refuses_metrics_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(UserError, match="metrics of format version 1, but this msf-faiss reads version 2 only"):
        write(path, 3, range(0))
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'
