"""Records the events of a run in its directory."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from msf_faiss.errors import UserError
from msf_faiss.run.directory import TENSORBOARD
from msf_faiss.run.events import Event, KnnEvaluated, RunStarted, TrainingProgress
from msf_faiss.run.metrics_file import METRICS, MetricsWriter
from msf_faiss.run.status import StatusWriter


class Recorder:
    """Writes status.json, metrics.jsonl and the TensorBoard file; call it with each event, in order.

    The status records an exception that leaves the context.

    Raises:
        UserError: if the disk is full or cannot be written, or existing metrics have another format version.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._status, self._tensorboard = StatusWriter(run_dir), _TensorBoardWriter(run_dir / TENSORBOARD)
        self._consumers = (self._status, MetricsWriter(run_dir / METRICS), self._tensorboard)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            with self._disk_errors():
                self._tensorboard.close()
            return
        for finish in (self._tensorboard.close, lambda: self._status.fail(error)):
            with contextlib.suppress(OSError):  # the disk may be the reason for the error
                finish()

    def __call__(self, event: Event) -> None:
        with self._disk_errors():
            for consume in self._consumers:
                consume(event)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            why, remedy = ("the disk is full", "Make room") if full else (error.strerror, "Make it writable")
            raise UserError(
                f"{self._run_dir}: cannot write the metrics: {why}. {remedy}, then start the same command again: all "
                "saved checkpoints are intact"
            ) from error


class _TensorBoardWriter:
    """Writes the metrics as scalars `train/…`; call it with each event, in order.

    It writes in the calling thread. torch's SummaryWriter uses another thread, which prints a traceback if the disk is
    full.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: RecordWriter | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._open(event.first_step)
            case TrainingProgress():
                self._scalars(event.step, event.metrics())
            case KnnEvaluated():
                self._scalars(event.step, {"knn_accuracy": event.accuracy})
            case _:
                pass

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self, first_step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter((self._folder / name).open("xb"))
        self._write(file_version="brain.Event:2")
        # Hides what a killed process recorded after its last checkpoint, or all if it had none.
        first_hidden = first_step + 1 if first_step else 0
        self._write(step=first_hidden, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def _scalars(self, step: int, values: Mapping[str, Any]) -> None:
        scalars = {name: value for name, value in values.items() if name != "step" and value is not None}
        tagged = [Summary.Value(tag=f"train/{name}", simple_value=value) for name, value in scalars.items()]
        self._write(step=step, summary=Summary(value=tagged))

    def _write(self, **content: Any) -> None:
        assert self._file is not None, "the first event is RunStarted"
        self._file.write(event_pb2.Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()
