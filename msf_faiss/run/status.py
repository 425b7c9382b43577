"""How a run goes, for those who look at it from elsewhere: what it last said of itself, and whether it is alive.

Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import filelock

from msf_faiss.errors import UserError

STATUS = "status.json"
LOCK = ".lock"
_SILENCE = 300.0  # seconds without a word after which a run on another host, whose lock says nothing here, is given up

State = Literal["training", "finished", "interrupted", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a run says of itself at each report; None: it has not said so yet."""

    state: State
    host: str
    pid: int
    time: float  # of the last word, Unix seconds
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
    message: str | None = None  # why it failed

    @classmethod
    def begin(cls, *, step: int, total_steps: int) -> Heartbeat:
        """That of a process which begins to train."""
        now = time.time()
        return cls(
            state="training",
            host=socket.gethostname(),
            pid=os.getpid(),
            time=now,
            started=now,
            step=step,
            total_steps=total_steps,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A run as it is now."""

    alive: bool  # a process trains there
    state: Literal["starting", "training", "finished", "interrupted", "failed", "dead"]
    heartbeat: Heartbeat | None  # None: it has not begun to train
    silent_seconds: float | None  # since its last word

    @property
    def well(self) -> bool:
        """Whether nothing has to be done: it trains, or has come to its end."""
        return self.state in {"starting", "training", "finished"}


def read_status(run_dir: Path) -> Status:
    """The status of a run, read without disturbing it.

    `dead`: its process is gone without a word, killed or out of power; the same command continues it.

    Raises:
        UserError: if there is no run at `run_dir`, or its status cannot be read.
    """
    beat = _heartbeat(run_dir / STATUS)
    if beat is None and not (run_dir / LOCK).exists():
        raise UserError(
            f"{run_dir}: no run there (it has no {STATUS}); the run directory is what `pretrain --out` named"
        )
    silent = None if beat is None else max(0.0, time.time() - beat.time)
    if beat is not None and beat.host != socket.gethostname():
        alive = beat.state == "training" and silent is not None and silent < _SILENCE
    else:
        alive = _is_held(run_dir / LOCK)
    state: Any = "starting" if beat is None else beat.state
    if alive and state != "training":
        state = "starting"  # a new process has begun, and its first report is still to come
    elif not alive and state in {"training", "starting"}:
        state = "dead"
    return Status(alive=alive, state=state, heartbeat=beat, silent_seconds=silent)


def _heartbeat(path: Path) -> Heartbeat | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(Heartbeat)}
        beat = Heartbeat(**{name: value for name, value in values.items() if name in known})
        return replace(beat, time=float(beat.time))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); it is written anew when the run goes on") from error


def _is_held(path: Path) -> bool:
    """Whether a process of this host holds a run's lock."""
    if not path.exists():
        return False
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return True
    except OSError:  # not ours to open: somebody else's run
        return False
    lock.release()
    return False
