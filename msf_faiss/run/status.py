"""RUN/status.json: run status, readable from another process. Needs no torch."""

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import filelock

from msf_faiss.errors import UserError
from msf_faiss.files import kind_of, write_atomic
from msf_faiss.run.events import (
    CheckpointSaved,
    Event,
    KnnEvaluated,
    RunEnded,
    RunStarted,
    TimeEstimated,
    TrainingProgress,
)

STATUS = "status.json"
LOCK = ".lock"
_SILENCE = 300.0  # seconds without an update after which a run on another host, whose lock is not visible, is dead


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a running process publishes at each event; None: not known yet."""

    state: Literal["training", "finished", "interrupted", "failed"]
    host: str
    pid: int
    time: float  # of the last update, Unix seconds
    started: float  # Unix seconds
    step: int
    total_steps: int
    epoch: float | None = None
    loss: float | None = None
    purity: float | None = None
    images_per_second: float | None = None
    eta_seconds: float | None = None
    data_time_ratio: float | None = None
    bank_time_ratio: float | None = None
    checkpoint: str | None = None
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None  # Unix seconds
    collapsing_since: int | None = None  # step
    knn_k: int | None = None
    knn_accuracy: float | None = None  # the latest
    knn_untrained: float | None = None
    knn_best: float | None = None
    knn_best_step: int | None = None
    message: str | None = None  # why it failed


class StatusWriter:
    """Writes status.json; call it with each event, in order.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / STATUS
        self._heartbeat: Heartbeat | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                now = time.time()
                self._heartbeat = Heartbeat(
                    state="training",
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    time=now,
                    started=now,
                    step=event.first_step,
                    total_steps=event.total_steps,
                    **(self._earlier_knn() if event.first_step else {}),
                )
                self._update()
            case TimeEstimated() | TrainingProgress():
                names = {field.name for field in fields(Heartbeat)}
                self._update(**{name: value for name, value in asdict(event).items() if name in names})
            case KnnEvaluated():
                names = {field.name for field in fields(Heartbeat)}
                values = {f"knn_{name}": value for name, value in asdict(event).items()}
                self._update(**{name: value for name, value in values.items() if name in names})
            case CheckpointSaved():
                self._update(checkpoint=str(event.path), checkpoint_step=event.step, checkpoint_time=time.time())
            case RunEnded():
                self._update(state=event.reason, step=event.step, epoch=event.epoch, checkpoint=str(event.checkpoint))
            case _:
                pass

    def fail(self, error: BaseException) -> None:
        """Record that `error` ended the run."""
        if isinstance(error, KeyboardInterrupt):
            self._update(state="interrupted")
        else:
            self._update(state="failed", message=str(error) or type(error).__name__)

    def _earlier_knn(self) -> dict[str, Any]:
        """The kNN accuracies that the run had before it was resumed; the next ones may be far away."""
        with contextlib.suppress(UserError):
            if (earlier := _read_heartbeat(self._path)) is not None:
                return {name: value for name, value in asdict(earlier).items() if name.startswith("knn_")}
        return {}

    def _update(self, **changes: Any) -> None:
        if self._heartbeat is not None:  # otherwise the run has not started
            self._heartbeat = replace(self._heartbeat, time=time.time(), **changes)
            write_atomic(self._path, json.dumps(asdict(self._heartbeat), indent=2) + "\n", sync=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Current status of a run."""

    alive: bool  # a process is training
    state: Literal["starting", "training", "finished", "interrupted", "failed", "dead"]
    heartbeat: Heartbeat | None  # None: training has not started
    silent_seconds: float | None  # since the last heartbeat

    @property
    def well(self) -> bool:
        """Whether no action is needed: the run is training, or finished."""
        return self.state in {"starting", "training", "finished"}


def read_status(run_dir: Path) -> Status:
    """Read the status of a run without disturbing it.

    `dead`: the process ended without recording why, for example after a kill or a power failure.

    Raises:
        UserError: if there is no run at `run_dir`, or its status cannot be read.
    """
    beat = _read_heartbeat(run_dir / STATUS)
    if beat is not None and beat.checkpoint is not None:
        copied = run_dir.joinpath(*Path(beat.checkpoint).parts[-2:])  # checkpoints/step-…
        if copied.is_dir():  # the run may have been moved or copied
            beat = replace(beat, checkpoint=str(copied))
    if beat is None and not kind_of(run_dir / LOCK):
        raise UserError(f"{run_dir}: no run there (it has no {STATUS}). Give the directory named by `pretrain --out`")
    silent = None if beat is None else max(0.0, time.time() - beat.time)
    if beat is not None and beat.host != socket.gethostname():
        alive = beat.state == "training" and silent is not None and silent < _SILENCE
    else:
        alive = _is_locked(run_dir / LOCK)
    state: Any = "starting" if beat is None else beat.state
    if alive and state != "training":
        state = "starting"  # a new process, before its first event
    elif not alive and state in {"training", "starting"}:
        state = "dead"
    return Status(alive=alive, state=state, heartbeat=beat, silent_seconds=silent)


def _read_heartbeat(path: Path) -> Heartbeat | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(Heartbeat)}
        beat = Heartbeat(**{name: value for name, value in values.items() if name in known})
        return replace(beat, time=float(beat.time))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Resuming the run rewrites it") from error


def _is_locked(path: Path) -> bool:
    """Whether a process on this host holds the lock of a run."""
    if not path.exists():
        return False
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return True
    except OSError:  # the run of another user
        return False
    lock.release()
    return False
