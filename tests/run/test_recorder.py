"""Recording events: TensorBoard files, and what happens to a full disk."""

from dataclasses import replace
from pathlib import Path

import pytest
from sample_events import PROGRESS, STARTED
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msf_faiss.errors import UserError
from msf_faiss.run.events import KnnEvaluated
from msf_faiss.run.metrics_file import METRICS
from msf_faiss.run.recorder import Recorder


def test_tensorboard_reads_the_metrics_of_a_resumed_run(tmp_path: Path) -> None:
    """Scalars that a killed process recorded after its last checkpoint give way to those of the resumed run."""
    with Recorder(tmp_path) as record:
        record(replace(STARTED, first_step=0))
        for step in range(1, 5):
            record(replace(PROGRESS, step=step, loss=1 / step))
    with Recorder(tmp_path) as record:
        record(replace(STARTED, first_step=2))
        record(replace(PROGRESS, step=3, loss=9.0))
        record(KnnEvaluated(step=3, epoch=0.3, k=5, accuracy=0.75, leave_one_out=False, seconds=1.0))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(scalar.step, scalar.value) for scalar in board.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert [(scalar.step, scalar.value) for scalar in board.Scalars("train/knn_accuracy")] == [(3, 0.75)]
    assert "train/bank_list_imbalance" in board.Tags()["scalars"]
    assert "train/purity" not in board.Tags()["scalars"]


def test_tensorboard_shows_a_run_that_starts_over_once(tmp_path: Path) -> None:
    """A process that was killed before its first checkpoint leaves its events in the directory."""
    for losses in ({0: 5.0, 1: 4.0, 2: 3.0, 3: 2.0}, {0: 5.5, 1: 4.5}):
        with Recorder(tmp_path) as record:
            record(replace(STARTED, first_step=0))
            for step, loss in losses.items():
                record(replace(PROGRESS, step=step, loss=loss))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(scalar.step, scalar.value) for scalar in board.Scalars("train/loss")] == [(0, 5.5), (1, 4.5)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_user_error(tmp_path: Path) -> None:
    with Recorder(tmp_path) as record:
        record(STARTED)
        (tmp_path / METRICS).unlink()
        (tmp_path / METRICS).symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"cannot write the metrics: the disk is full\. Make room"):
            record(PROGRESS)
