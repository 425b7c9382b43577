"""The directory of a run: who may use it, and the two records kept in it.

RUN/config.yaml        the effective config
RUN/metrics.jsonl      one object a report: step, epoch, loss and more
RUN/tensorboard/       the same for TensorBoard
RUN/status.json        how it goes, see `status`
RUN/checkpoints/       see `checkpoint`
RUN/results/           what the evaluations found
RUN/features/          what they keep for each other; may be deleted
RUN/neighbors/         galleries
RUN/exports/           encoders for other libraries, see `export`
RUN/profile/           traces, see `profiling`
RUN/report.html        all of it on one page, see `report`
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
from torch.utils.tensorboard import SummaryWriter

from msf_faiss.checkpoint import FOLDER, holds_checkpoints, remove_unfinished
from msf_faiss.config import Config
from msf_faiss.config_file import dump_config
from msf_faiss.errors import UserError
from msf_faiss.files import write_whole
from msf_faiss.profiling import FOLDER as PROFILE
from msf_faiss.reports import (
    BankImproved,
    CheckpointSaved,
    Collapsing,
    Evaluated,
    Report,
    RunEnded,
    RunStarted,
    StepReport,
)
from msf_faiss.status import LOCK, STATUS, Heartbeat, State

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
BOARD = "tensorboard"
REPORT = "report.html"
_PATIENCE = 3.0  # seconds: a process that was killed takes a while to give all of its memory back, then the lock


@contextlib.contextmanager
def claimed(run_dir: Path, config: Config, *, resume: bool) -> Iterator[bool]:
    """Hold `run_dir` for one process, with the config written into it. The lock ends with the process, however it ends.

    Yields:
        True if it holds a run to continue, False if the run is new.

    Raises:
        UserError: if it holds a run and `resume` is false, holds other things, is in use, or cannot be written.
    """
    _refuse_used(run_dir, resume=resume)
    lock = filelock.FileLock(run_dir / LOCK)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE)
    except filelock.Timeout as error:
        raise UserError(f"{run_dir}: another process is training there; choose another directory with --out") from error
    except OSError as error:
        raise UserError(_cannot_write(run_dir, error)) from error
    with lock:
        _refuse_used(run_dir, resume=resume)  # another process may have been quicker
        continued = holds_checkpoints(run_dir)
        try:
            remove_unfinished(run_dir)
            if not continued:
                (run_dir / FOLDER).mkdir(exist_ok=True)
                (run_dir / CONFIG).write_text(dump_config(config), encoding="utf-8")
        except OSError as error:
            raise UserError(_cannot_write(run_dir, error)) from error
        yield continued


def sync_records(run_dir: Path) -> None:
    """Have the disk hold all lines of metrics.jsonl so far: a checkpoint must not survive what led to it.

    Raises:
        OSError: if the disk fails.
    """
    with contextlib.suppress(FileNotFoundError), (run_dir / METRICS).open("rb") as file:
        os.fsync(file.fileno())


def write_config(run_dir: Path, config: Config) -> None:
    """Replace the effective config of a run.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        write_whole(run_dir / CONFIG, dump_config(config))
    except OSError as error:
        raise UserError(_cannot_write(run_dir, error)) from error


def _refuse_used(run_dir: Path, *, resume: bool) -> None:
    if run_dir.is_file():
        raise UserError(f"{run_dir}: is a file; choose a directory with --out")
    if holds_checkpoints(run_dir):
        if resume:
            return
        raise UserError(
            f"{run_dir}: already holds a run; leave out --resume never to continue it, or choose another directory "
            "with --out"
        )
    # A run that ended before its first checkpoint has nothing to lose.
    found = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    strange = sorted(found - {CONFIG, METRICS, BOARD, FOLDER, LOCK, STATUS, PROFILE, REPORT})
    if strange:
        raise UserError(
            f"{run_dir}: holds other things ({', '.join(strange[:3])}{', …' if len(strange) > 3 else ''}); "
            "choose an empty or a new directory with --out"
        )


def _cannot_write(run_dir: Path, error: OSError) -> str:
    return f"{run_dir}: cannot write the run directory: {error.strerror}; choose another with --out"


class Recorder:
    """Writes a run's reports to metrics.jsonl and TensorBoard; call it with each report, in order.

    Every line of metrics.jsonl has step, epoch and loss; the lines of a kNN evaluation add knn_accuracy and its
    settings, and where the bank improved itself a line says so. A resumed run first drops the lines from after its
    checkpoint, so that no step is there twice.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._board: SummaryWriter | None = None
        self._last: StepReport | None = None
        self._heartbeat: Heartbeat | None = None
        self._on_thread_error = threading.excepthook

    def __enter__(self) -> Recorder:
        self._on_thread_error, threading.excepthook = threading.excepthook, self._keep_quiet
        return self

    def _keep_quiet(self, error: threading.ExceptHookArgs) -> None:
        """TensorBoard's writer prints the traceback of a full disk, and hands the error to whoever writes next too."""
        if not (isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard")):
            self._on_thread_error(error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._board is not None:
                self._board.close()
        except OSError as failure:
            if error is None:
                raise UserError(_cannot_record(self._run_dir, failure)) from failure
        finally:
            threading.excepthook = self._on_thread_error
        if error is not None and self._heartbeat is not None:
            with contextlib.suppress(OSError):  # the disk may be what went wrong
                interrupted = isinstance(error, KeyboardInterrupt)
                self._beat(
                    state="interrupted" if interrupted else "failed",
                    message=None if interrupted else str(error) or type(error).__name__,
                )

    def __call__(self, report: Report) -> None:
        try:
            self._record(report)
        except OSError as error:
            raise UserError(_cannot_record(self._run_dir, error)) from error

    def _beat(self, **changes: Any) -> None:
        """Tell `msf-faiss status` what is new."""
        assert self._heartbeat is not None, "the first report of a run is RunStarted"
        self._heartbeat = replace(self._heartbeat, time=time.time(), **changes)
        write_whole(self._run_dir / STATUS, json.dumps(asdict(self._heartbeat), indent=2) + "\n", sync=False)

    def _record(self, report: Report) -> None:
        match report:
            case RunStarted():
                self._heartbeat = Heartbeat.begin(step=report.first_step, total_steps=report.total_steps)
                self._beat()
                _drop_lines_after(self._run_dir / METRICS, report.first_step)
                self._board = SummaryWriter(
                    str(self._run_dir / BOARD), purge_step=report.first_step + 1 if report.first_step else None
                )
            case StepReport():
                self._last = report
                values = asdict(report)
                values |= {f"bank_{name}": value for name, value in values.pop("bank_readings").items()}
                self._line(values)
                self._scalars("train", values, report.step)
                told = {field.name for field in fields(Heartbeat)}
                self._beat(**{name: value for name, value in values.items() if name in told})
            case CheckpointSaved():
                self._beat(checkpoint=str(report.path), checkpoint_step=report.step, checkpoint_time=time.time())
            case Collapsing():
                loss = self._last.loss if self._last else None
                self._line({"step": report.step, "epoch": report.epoch, "loss": loss, "collapse": asdict(report)})
            case RunEnded():
                state: State = "finished" if report.reason == "finished" else "interrupted"
                self._beat(state=state, step=report.step, epoch=report.epoch, checkpoint=str(report.checkpoint))
            case Evaluated():
                loss = self._last.loss if self._last else None
                knn = {f"knn_{name}": value for name, value in asdict(report).items() if name not in {"step", "epoch"}}
                self._line({"step": report.step, "epoch": report.epoch, "loss": loss, **knn})
                self._scalars("knn", {"accuracy": report.accuracy}, report.step)
            case BankImproved():
                loss = self._last.loss if self._last else None
                self._line({"step": report.step, "epoch": report.epoch, "loss": loss, "bank_improved": report.text})
            case _:
                pass

    def _line(self, values: dict[str, Any]) -> None:
        with (self._run_dir / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def _scalars(self, group: str, values: dict[str, Any], step: int) -> None:
        assert self._board is not None, "the first report of a run is RunStarted"
        for name, value in values.items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"{group}/{name}", value, step)


def _cannot_record(run_dir: Path, error: OSError) -> str:
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    why, remedy = ("the disk is full", "make room") if full else (error.strerror, "make it writable")
    return (
        f"{run_dir}: cannot write the metrics: {why}; {remedy} and start the same command again: checkpoints "
        "already saved are intact"
    )


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:  # cut short by a kill
            continue
    write_whole(path, "".join(kept))
