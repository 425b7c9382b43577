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
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from msf_faiss.checkpoint.format import FOLDER, list_checkpoints
from msf_faiss.checkpoint.save import remove_incomplete
from msf_faiss.config import Config
from msf_faiss.config.load import dump_config
from msf_faiss.errors import UserError
from msf_faiss.files import write_atomic
from msf_faiss.run.metrics_file import METRICS
from msf_faiss.run.status import LOCK, STATUS

CONFIG = "config.yaml"
BOARD = "tensorboard"
PROFILE = "profile"
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
        continued = bool(list_checkpoints(run_dir))
        try:
            remove_incomplete(run_dir)
            if not continued:
                (run_dir / FOLDER).mkdir(exist_ok=True)
                (run_dir / CONFIG).write_text(dump_config(config), encoding="utf-8")
        except OSError as error:
            raise UserError(_cannot_write(run_dir, error)) from error
        yield continued


def sync_metrics(run_dir: Path) -> None:
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
        write_atomic(run_dir / CONFIG, dump_config(config))
    except OSError as error:
        raise UserError(_cannot_write(run_dir, error)) from error


def _refuse_used(run_dir: Path, *, resume: bool) -> None:
    if run_dir.is_file():
        raise UserError(f"{run_dir}: is a file; choose a directory with --out")
    if list_checkpoints(run_dir):
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
