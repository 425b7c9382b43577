"""What consumes the events of a run: metrics.jsonl, TensorBoard and the status file."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from msf_faiss.errors import UserError
from msf_faiss.files import write_atomic
from msf_faiss.run.directory import BOARD
from msf_faiss.run.events import (
    BankAdjusted,
    CheckpointSaved,
    CollapseDetected,
    Event,
    KnnEvaluated,
    RunEnded,
    RunStarted,
    TrainingProgress,
)
from msf_faiss.run.metrics_file import METRICS, append_metrics, begin_metrics
from msf_faiss.run.status import STATUS, Heartbeat, State


class Recorder:
    """Writes a run's reports to metrics.jsonl and TensorBoard; call it with each report, in order.

    Every line of metrics.jsonl has step, epoch and loss; the lines of a kNN evaluation add knn_accuracy and its
    settings, and where the bank improved itself a line says so. A resumed run first drops the lines from after its
    checkpoint, so that no step is there twice.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._board: SummaryWriter | None = None
        self._last: TrainingProgress | None = None
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

    def __call__(self, report: Event) -> None:
        try:
            self._record(report)
        except OSError as error:
            raise UserError(_cannot_record(self._run_dir, error)) from error

    def _beat(self, **changes: Any) -> None:
        """Tell `msf-faiss status` what is new."""
        assert self._heartbeat is not None, "the first report of a run is RunStarted"
        self._heartbeat = replace(self._heartbeat, time=time.time(), **changes)
        write_atomic(self._run_dir / STATUS, json.dumps(asdict(self._heartbeat), indent=2) + "\n", sync=False)

    def _record(self, report: Event) -> None:
        match report:
            case RunStarted():
                self._heartbeat = Heartbeat.begin(step=report.first_step, total_steps=report.total_steps)
                self._beat()
                begin_metrics(self._run_dir / METRICS, report.first_step)
                self._board = SummaryWriter(
                    str(self._run_dir / BOARD), purge_step=report.first_step + 1 if report.first_step else None
                )
            case TrainingProgress():
                self._last = report
                values = asdict(report)
                values |= {f"bank_{name}": value for name, value in values.pop("bank_metrics").items()}
                self._line(values)
                self._scalars(values, report.step)
                told = {field.name for field in fields(Heartbeat)}
                self._beat(**{name: value for name, value in values.items() if name in told})
            case CheckpointSaved():
                self._beat(checkpoint=str(report.path), checkpoint_step=report.step, checkpoint_time=time.time())
            case CollapseDetected():
                loss = self._last.loss if self._last else None
                self._line({"step": report.step, "epoch": report.epoch, "loss": loss, "collapse": asdict(report)})
            case RunEnded():
                state: State = "finished" if report.reason == "finished" else "interrupted"
                self._beat(state=state, step=report.step, epoch=report.epoch, checkpoint=str(report.checkpoint))
            case KnnEvaluated():
                loss = self._last.loss if self._last else None
                knn = {f"knn_{name}": value for name, value in asdict(report).items() if name not in {"step", "epoch"}}
                self._line({"step": report.step, "epoch": report.epoch, "loss": loss, **knn})
                self._scalars({"knn_accuracy": report.accuracy}, report.step)
            case BankAdjusted():
                loss = self._last.loss if self._last else None
                self._line({"step": report.step, "epoch": report.epoch, "loss": loss, "bank_adjusted": report.text})
            case _:
                pass

    def _line(self, values: dict[str, Any]) -> None:
        append_metrics(self._run_dir / METRICS, values)

    def _scalars(self, values: dict[str, Any], step: int) -> None:
        assert self._board is not None, "the first report of a run is RunStarted"
        for name, value in values.items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"train/{name}", value, step)


def _cannot_record(run_dir: Path, error: OSError) -> str:
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    why, remedy = ("the disk is full", "make room") if full else (error.strerror, "make it writable")
    return (
        f"{run_dir}: cannot write the metrics: {why}; {remedy} and start the same command again: checkpoints "
        "already saved are intact"
    )
