"""Events of a run, in the order in which `pretrain` yields them. Plain values; needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """The first event: the data are open and the model is built."""

    run_dir: Path
    device: str
    images: int
    classes: int | None  # None: unlabelled
    parameters: int  # of the online encoder and the predictor
    feature_dim: int
    embedding_dim: int
    bank: str
    engine_ms: Mapping[str, float]  # milliseconds per search of each exact engine, fastest first; empty: not timed
    notes: tuple[str, ...]  # differences from the run that is resumed
    steps_per_epoch: int
    total_steps: int
    first_step: int  # steps already finished: 0, or more in a resumed run
    evaluates_untrained: bool = False  # the kNN accuracy of the untrained network comes next


@dataclass(frozen=True, slots=True, kw_only=True)
class CachingImages:
    """The images are being decoded into memory; the first step waits for that."""

    images: int
    memory: int  # bytes per rank, estimated; 0: no cache, since downscaling such large images while decoding is faster


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimated:
    """How long the run will take, from the second step of this process; the first one also warms up."""

    step: int
    images_per_second: float
    eta_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """Metrics since the previous `TrainingProgress`; means over steps unless noted."""

    step: int  # finished steps
    epoch: float  # finished epochs
    loss: float
    purity: float | None  # ratio of neighbours with the query's label, own image excluded; None: nothing to compare
    learning_rate: float
    ema_momentum: float
    bank_fill_ratio: float
    neighbor_age_mean: float  # entries pushed since the neighbour was; the query's own image excluded
    neighbor_age_p95: float
    hubness: float  # ratio of queries that retrieve an entry, mean of the ten most retrieved entries
    recall_at_k: float | None  # of an approximate bank, from its latest checks; None: exact bank, or no check yet
    embedding_std: float  # of the newest embeddings, see `monitors.Spread`: 1 on an even sphere, 0 if all are equal
    effective_rank: float  # of the newest 256 embeddings
    collapsing_since: int | None  # step; None: the embeddings are not collapsing
    push_ms: float  # per step
    search_ms: float  # per step, mean of the neighbours included
    bank_metrics: Mapping[str, float]  # metrics specific to this kind of bank
    images_per_second: float
    data_time_ratio: float  # of the wall time: waiting for data, and augmenting
    bank_time_ratio: float  # push, search, mean of the neighbours, recall checks
    model_time_ratio: float  # forward, backward, optimizer, everything else
    eta_seconds: float  # at this process's mean rate
    unreadable_images: int  # skipped so far

    def metrics(self) -> dict[str, Any]:
        """The metrics by name, those of the bank as `bank_…`."""
        values = asdict(self)
        return values | {f"bank_{name}": value for name, value in values.pop("bank_metrics").items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnEvaluated:
    """kNN accuracy (0..1) of the online encoder's backbone features, at first of the untrained network."""

    step: int  # 0: untrained
    epoch: float
    k: int
    accuracy: float
    leave_one_out: bool  # True: evaluated among the training images, because there are no test images
    seconds: float
    images: int | None = None  # that were classified
    untrained: float | None = None  # accuracy before training; None: unknown
    best: float | None = None  # highest accuracy since training began; None: it has not begun
    best_step: int | None = None
    warning: str | None = None  # why training may be doing harm; once, when that begins


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint is on disk. It was written in the background, so its step may precede the latest progress."""

    step: int
    epoch: float
    path: Path
    seconds: float  # from the start of the save
    stalled_seconds: float  # for which training waited


@dataclass(frozen=True, slots=True, kw_only=True)
class BankAdjusted:
    """An approximate bank fell below its minimum recall, and changed its search to raise it."""

    step: int
    epoch: float
    text: str  # the recall, and the change


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapseDetected:
    """The embeddings are collapsing to a point or a line: the run has stopped learning."""

    step: int
    epoch: float
    since: int  # step of the first progress event that showed it
    embedding_std: float
    effective_rank: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfiled:
    """Time of each part of a step, as means over some steps. A trace of three later steps is on disk."""

    step: int
    epoch: float
    steps: int  # number of timed steps
    seconds: float  # wall time per step
    parts: Mapping[str, float]  # seconds per step: data, views, target, push, search, online, backward, optimizer, …
    overlapped: bool  # push and search ran during the online forward, so the parts sum to more than `seconds`
    images: float  # per step, over all ranks
    trace: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """The last event. A checkpoint of the last step exists, interrupted or not."""

    step: int
    epoch: float
    reason: Literal["finished", "interrupted"]
    checkpoint: Path
    seconds: float


Event = (
    RunStarted
    | CachingImages
    | TimeEstimated
    | TrainingProgress
    | KnnEvaluated
    | CheckpointSaved
    | BankAdjusted
    | CollapseDetected
    | StepProfiled
    | RunEnded
)
