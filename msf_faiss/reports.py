"""What a run tells its caller, in the order in which it happens. Plain values: nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """The data are open and the model is built; the next report comes from a step."""

    run_dir: Path
    device: str
    images: int
    classes: int | None  # None: unlabelled
    parameters: int  # of the online encoder and the predictor
    feature_dim: int
    embedding_dim: int
    bank: str
    steps_per_epoch: int
    total_steps: int
    first_step: int  # steps already done: 0, or more on a resumed run


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The means since the report before. `step` counts finished steps, `epoch` is a fraction of epochs done."""

    step: int
    epoch: float
    loss: float
    purity: float | None  # without entries of the query's own image; None: unlabelled, or no other entries yet
    learning_rate: float
    target_momentum: float
    bank_fill: float  # 0..1
    neighbor_age: float  # mean over the neighbours, in entries pushed since; the own entry left out
    images_per_second: float
    data_share: float  # of the wall time: waiting for data, and making views
    bank_share: float  # push, search and mean
    model_share: float  # forward, backward, optimizer and everything else
    seconds_left: float  # at the mean rate since this process began
    unreadable: int  # images left out so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """kNN accuracy (0..1) of the online encoder's backbone features during training."""

    step: int
    epoch: float
    k: int
    accuracy: float
    leave_one_out: bool  # True: among the training images, there being no test images
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    step: int
    epoch: float
    path: Path
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """The last report. `interrupted`: the caller asked to stop; a checkpoint was saved all the same."""

    step: int
    epoch: float
    reason: Literal["finished", "interrupted"]
    checkpoint: Path
    seconds: float


Report = RunStarted | StepReport | Evaluated | CheckpointSaved | RunEnded
