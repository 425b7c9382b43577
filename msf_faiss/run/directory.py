"""The directory of a run: its contents, and the lock that keeps other processes out.

RUN/config.yaml        the effective config of the newest checkpoint
RUN/metrics.jsonl      metrics, see `metrics_file`
RUN/tensorboard/       the same metrics for TensorBoard
RUN/status.json        see `status`
RUN/checkpoints/       see `checkpoint.format`
RUN/results/           of evaluations
RUN/features/          cached for evaluations; may be deleted
RUN/neighbors/         pages of inspect-neighbors
RUN/exports/           encoders in other formats, see `export`
RUN/profile/           traces, see `train.profiler`
RUN/report.html        everything on one page, see `report`
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from msf_faiss.checkpoint.format import FOLDER, list_checkpoints
from msf_faiss.checkpoint.save import remove_incomplete
from msf_faiss.config import Config
from msf_faiss.config.load import dump_config, load_config
from msf_faiss.errors import UserError
from msf_faiss.files import kind_of, write_atomic
from msf_faiss.run.metrics_file import METRICS
from msf_faiss.run.status import LOCK, STATUS

CONFIG = "config.yaml"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
REPORT = "report.html"
_LOCK_TIMEOUT = 3.0  # seconds: a killed process frees its memory first, then the lock


@contextlib.contextmanager
def lock_run(run_dir: Path, *, resume: bool) -> Iterator[None]:
    """Lock `run_dir` for this process. However the process ends, the lock is freed.

    A new directory in which no run starts is deleted again.

    Raises:
        UserError: if it contains a run and `resume` is False, contains other files, is in use, or cannot be written.
    """
    _refuse_occupied(run_dir, resume=resume)
    is_new = not run_dir.exists()
    lock = filelock.FileLock(run_dir / LOCK)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_LOCK_TIMEOUT)
    except filelock.Timeout as error:
        raise UserError(f"{run_dir}: another process is training there. Choose another directory with --out") from error
    except OSError as error:
        raise UserError(_cannot_write(run_dir, error)) from error
    with lock:
        _refuse_occupied(run_dir, resume=resume)  # another process may have been faster
        try:
            remove_incomplete(run_dir)
            (run_dir / FOLDER).mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(_cannot_write(run_dir, error)) from error
        try:
            yield
        finally:
            if is_new and not (run_dir / CONFIG).exists():
                with contextlib.suppress(OSError):
                    (run_dir / FOLDER).rmdir()
                    (run_dir / LOCK).unlink()
                    run_dir.rmdir()


def sync_metrics(run_dir: Path) -> None:
    """Sync metrics.jsonl to the disk: a checkpoint must not outlive the metrics before it.

    Raises:
        OSError: if the disk fails.
    """
    with contextlib.suppress(FileNotFoundError), (run_dir / METRICS).open("rb") as file:
        os.fsync(file.fileno())


def write_config(run_dir: Path, config: Config) -> None:
    """Write the effective config of a run, if the file does not have it already.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with contextlib.suppress(UserError):  # missing, or not valid
            if load_config(run_dir / CONFIG) == config:  # perhaps with the user's comments
                return
        write_atomic(run_dir / CONFIG, dump_config(config))
    except OSError as error:
        raise UserError(_cannot_write(run_dir, error)) from error


def _refuse_occupied(run_dir: Path, *, resume: bool) -> None:
    kind = kind_of(run_dir, "choose another directory with --out")
    if kind not in (None, "folder"):
        raise UserError(f"{run_dir}: is a file. Choose a directory with --out")
    if list_checkpoints(run_dir):
        if resume:
            return
        raise UserError(
            f"{run_dir}: already contains a run. Omit --resume never to resume it, or choose another directory with "
            "--out"
        )
    # A run that ended before its first checkpoint has nothing to lose.
    names = {path.name for path in run_dir.iterdir()} if kind else set()
    foreign = sorted(names - {CONFIG, METRICS, TENSORBOARD, FOLDER, LOCK, STATUS, PROFILE, REPORT})
    if foreign:
        raise UserError(
            f"{run_dir}: contains other files ({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}). "
            "Choose an empty or new directory with --out"
        )


def _cannot_write(run_dir: Path, error: OSError) -> str:
    return f"{run_dir}: cannot write the run directory: {error.strerror}. Choose another with --out"
