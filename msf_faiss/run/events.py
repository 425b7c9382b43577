"""What a run tells its caller, in the order in which it happens. Plain values: nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping
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
    engine_ms: Mapping[str, float]  # milliseconds of a search by each exact engine, the fastest first; empty: not timed
    notes: tuple[str, ...]  # what differs from the run that is continued
    steps_per_epoch: int
    total_steps: int
    first_step: int  # steps already done: 0, or more on a resumed run


@dataclass(frozen=True, slots=True, kw_only=True)
class CachingImages:
    """The images are being decoded, to be held in memory; the first step waits for it."""

    images: int
    memory: int  # about so many bytes, of each rank; 0: none, since decoders make such large images smaller, quicker


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """The means since the report before. `step` counts finished steps, `epoch` is a fraction of epochs done."""

    step: int
    epoch: float
    loss: float
    purity: float | None  # without entries of the query's own image; None: unlabelled, or no other entries yet
    learning_rate: float
    ema_momentum: float
    bank_fill_ratio: float  # 0..1
    neighbor_age_mean: float  # mean over the neighbours, in entries pushed since; the own entry left out
    neighbor_age_p95: float  # 95 % are not older
    hubness: (
        float  # share of the queries that find one of the ten most found entries (mean of the ten), own entry left out
    )
    recall_at_k: float | None  # of an approximate bank, as of its last checks; None: exact, or not checked yet
    embedding_std: float  # of the newest embeddings, see `monitor.Spread`: 1 evenly spread, 0 all the same
    effective_rank: float  # of the same, at most the smaller of 256 and their dimensions
    collapsing_since: int | None  # step; None: the embeddings are not collapsing
    push_ms: float  # a step
    search_ms: float  # a step; the mean of the neighbours included
    bank_metrics: Mapping[str, float]  # what only this kind of bank knows about itself
    images_per_second: float
    data_time_ratio: float  # of the wall time: waiting for data, and making views
    bank_time_ratio: float  # push, search, mean and checks
    model_time_ratio: float  # forward, backward, optimizer and everything else
    eta_seconds: float  # at the mean rate since this process began
    unreadable_images: int  # images left out so far


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnEvaluated:
    """kNN accuracy (0..1) of the online encoder's backbone features during training."""

    step: int
    epoch: float
    k: int
    accuracy: float
    leave_one_out: bool  # True: among the training images, there being no test images
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is on disk. Training went on meanwhile: its step may be earlier than the last report's."""

    step: int
    epoch: float
    path: Path
    seconds: float  # until it was there
    stalled_seconds: float  # of them, how long training waited


@dataclass(frozen=True, slots=True, kw_only=True)
class BankAdjusted:
    """An approximate bank found fewer neighbours than promised, and did something about it."""

    step: int
    epoch: float
    text: str  # the recall, and what was done


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapseDetected:
    """The embeddings have come to lie close together: the run learns nothing more."""

    step: int
    epoch: float
    since: int  # step of the first report that showed it
    embedding_std: float
    effective_rank: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfiled:
    """Where the time of some steps went; a trace of a few later ones is on disk."""

    step: int
    epoch: float
    steps: int  # that were timed
    seconds: float  # wall time of one
    parts: Mapping[str, float]  # seconds of one: data, views, target, push, search, online, backward, optimizer, ...
    beside: bool  # push and search went on beside the online encoder's forward, so that the parts add up to more
    images: float  # of one, on all ranks
    trace: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """The last report. `interrupted`: the caller asked to stop; the step that it ended with is saved all the same."""

    step: int
    epoch: float
    reason: Literal["finished", "interrupted"]
    checkpoint: Path
    seconds: float


Event = (
    RunStarted
    | CachingImages
    | TrainingProgress
    | KnnEvaluated
    | CheckpointSaved
    | BankAdjusted
    | CollapseDetected
    | StepProfiled
    | RunEnded
)
