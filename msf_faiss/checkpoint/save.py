"""Writing and tidying checkpoints: each appears complete or not at all, and none is ever overwritten."""

import datetime
import errno
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

import msf_faiss
from msf_faiss.checkpoint.format import (
    ENDING,
    FOLDER,
    FORMAT,
    MANIFEST,
    PREFIX,
    VERSION,
    list_checkpoints,
    seal_of,
    sha256_of,
    step_of,
)
from msf_faiss.checkpoint.hold import DELETING, delete_unless_held
from msf_faiss.config import Config
from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.errors import UserError

_TEMPORARY = ".saving-"
_DAMAGED = "damaged-"

T = TypeVar("T")


def save_checkpoint(
    run_dir: Path,
    *,
    step: int,
    epoch: float,
    config: Config,
    dataset_size: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    origin: str | None = None,
    origin_seal: str | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write a checkpoint into a temporary directory, sync it to disk and rename it. All ranks take part.

    Args:
        run_dir: the run directory.
        step: completed steps.
        epoch: completed epochs.
        config: the effective config.
        dataset_size: training images, unreadable ones included.
        tensors: for each file that this rank writes (its name without ending), the tensors by name.
        origin: the checkpoint of another run that this run started from.
        origin_seal: SHA-256 of its manifest, by which it is known when it has moved.
        ranks: the ranks that write together.

    Returns:
        The checkpoint's directory.

    Raises:
        UserError: if writing fails on any rank, because the disk is full, say. Earlier checkpoints stay intact, and
            nothing incomplete is left behind.
    """
    final = run_dir / FOLDER / f"{PREFIX}{step:08d}"
    temporary = final.with_name(f"{_TEMPORARY}{final.name}")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "epoch": epoch,
        "dataset_size": dataset_size,
        "origin": origin,
        "origin_sha256": origin_seal,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "msf_faiss": msf_faiss.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": sys.version.split()[0],
        },
        "config": config.model_dump(mode="json"),
    }
    try:
        _on_all(ranks, lambda: _make_empty(temporary) if ranks.is_main else None)
        written = _on_all(ranks, lambda: [_write_file(temporary, name, tensors[name]) for name in tensors])
        manifest["files"] = dict(sorted(file for files in written for file in files))
        _on_all(ranks, lambda: _publish(temporary, final, manifest) if ranks.is_main else None)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(_cannot_save(run_dir, step, error)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def prune_checkpoints(run_dir: Path, *, keep_last: int, keep: Callable[[int], bool]) -> None:
    """Delete a run's checkpoints except the newest `keep_last`, and those for whose step `keep` returns true.

    One that another process reads stays until a later call.
    """
    for path in list_checkpoints(run_dir)[:-keep_last]:
        if not keep(step_of(path)):
            delete_unless_held(path, path / MANIFEST)


def remove_incomplete(run_dir: Path) -> None:
    """Delete the checkpoints that a killed process did not finish writing or deleting."""
    for prefix in (_TEMPORARY, DELETING):
        for path in (run_dir / FOLDER).glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def quarantine(path: Path) -> Path:
    """Rename a damaged checkpoint so that no run uses it; nothing is deleted.

    Raises:
        UserError: if it cannot be renamed.
    """
    for number in itertools.count(1):
        renamed = path.with_name(f"{_DAMAGED}{path.name}" + (f"-{number}" if number > 1 else ""))
        if not renamed.exists():
            break
    try:
        return path.rename(renamed)
    except OSError as error:
        raise UserError(f"{path}: damaged, and cannot be renamed: {error.strerror}; make it writable") from error


def _on_all(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """The result of `work` on each rank. If it fails on one it fails on all, so that no rank waits forever.

    Raises:
        OSError: the error of the first rank that failed.
    """
    outcome: T | OSError
    try:
        outcome = work()
    except OSError as error:
        outcome = error
    except safetensors.SafetensorError as error:
        outcome = OSError(errno.ENOSPC if "No space left" in str(error) else errno.EIO, str(error))
    outcomes: list[T] = []
    for each in ranks.gather_objects(outcome):
        if isinstance(each, OSError):
            raise each
        outcomes.append(each)
    return outcomes


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_file(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, int | str]]:
    """Write and sync one file of tensors; return its name and its entry in the manifest."""
    path = folder / f"{name}{ENDING}"
    safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    _sync(path)
    return path.name, {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, then give the checkpoint its name."""
    manifest["sha256"] = seal_of(manifest)
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _sync(temporary / MANIFEST)
    _sync(temporary)
    temporary.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_save(run_dir: Path, step: int, error: OSError) -> str:
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    reason = "the disk is full" if full else error.strerror or str(error)
    remedy = "free some space" if full else "make it writable"
    saved = list_checkpoints(run_dir)
    last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no earlier checkpoint"
    return f"{run_dir / FOLDER}: cannot save step {step}: {reason}; {remedy} and run the same command again ({last})"
