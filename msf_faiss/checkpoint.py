"""Checkpoints: directories that appear whole or not at all, and are verified before they are believed.

    RUN/checkpoints/step-00001234/
        manifest.json          step, epoch, config, versions; size and SHA-256 of each file below
        model.safetensors      online encoder, predictor, target encoder; parameters and batch statistics
        optimizer.safetensors  momentum buffers, by parameter
        bank.safetensors       the ring, its ids and its counter
        rng.safetensors        torch's generators
        monitor.safetensors    what was counted since the last report

Nothing is pickled, so nothing is executed by loading.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

import msf_faiss
from msf_faiss.bank import Bank, create_bank
from msf_faiss.config import Config
from msf_faiss.config_tree import dotted, key_of
from msf_faiss.errors import UserError
from msf_faiss.models import MeanShift, build_model

FORMAT = "msf-faiss checkpoint"
VERSION = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
_TEMPORARY = ".saving-"

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk whose manifest has been read and whose files have the right sizes."""

    path: Path
    step: int  # finished steps
    epoch: float  # finished epochs
    config: Config
    run_dir: Path | None  # None: the checkpoint lies outside a run
    dataset_size: int  # images of the training set, unreadable ones included
    files: Mapping[str, str]  # name -> SHA-256

    def tensors(self, name: str) -> Tensors:
        """The tensors of the file `name`.safetensors, on the CPU.

        Raises:
            UserError: if the file is not what was saved.
        """
        path = self.path / f"{name}.safetensors"
        try:
            if path.name not in self.files or _sha256(path) != self.files[path.name]:
                raise UserError(_damaged(self.path, f"{path.name} is not what was saved (its SHA-256 differs)"))
            return safetensors.torch.load_file(path)
        except OSError as error:
            raise UserError(_damaged(self.path, f"{path.name} cannot be read ({error.strerror})")) from error


def save_checkpoint(
    run_dir: Path,
    *,
    step: int,
    epoch: float,
    config: Config,
    dataset_size: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> Path:
    """Write a checkpoint of a run: into a temporary folder, synced to disk, then renamed.

    Args:
        run_dir: the run's directory.
        step: finished steps.
        epoch: finished epochs.
        config: the effective config.
        dataset_size: images of the training set.
        tensors: for each file (without ending) its tensors by name.

    Returns:
        The checkpoint's directory.

    Raises:
        UserError: if the disk is full or cannot be written; earlier checkpoints are intact, nothing half-written stays.
    """
    final = run_dir / FOLDER / f"step-{step:08d}"
    temporary = final.with_name(f"{_TEMPORARY}{final.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        files = {}
        for name, named in tensors.items():
            path = temporary / f"{name}.safetensors"
            safetensors.torch.save_file({key: value.contiguous() for key, value in named.items()}, path)
            _sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "epoch": epoch,
            "dataset_size": dataset_size,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {
                "msf_faiss": msf_faiss.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": sys.version.split()[0],
            },
            "files": files,
            "config": config.model_dump(mode="json"),
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _sync(temporary / MANIFEST)
        _sync(temporary)
        _replace(temporary, final)
        _sync(final.parent)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(_cannot_save(run_dir, step, error)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def prune_checkpoints(run_dir: Path, *, keep_last: int, keep: Callable[[int], bool]) -> None:
    """Delete all checkpoints of a run but the newest `keep_last` and those whose step `keep` accepts."""
    for path in _checkpoints(run_dir)[:-keep_last]:
        if not keep(_step_of(path)):
            shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(run_dir: Path) -> None:
    """Delete what a killed process left of a checkpoint that it was writing."""
    for path in (run_dir / FOLDER).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def holds_checkpoints(run_dir: Path) -> bool:
    """Whether a run has saved at least one checkpoint."""
    return bool(_checkpoints(run_dir))


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest one of the run at `path`.

    Raises:
        UserError: if there is none, it is damaged, or it is not ours.
    """
    if not path.exists():
        raise UserError(
            f"{path}: no such run directory or checkpoint; the run directory is what `pretrain --out` named"
        )
    if path.name == MANIFEST:
        path = path.parent
    if not path.is_dir():
        raise UserError(
            f"{path}: not a checkpoint of msf-faiss, which is a directory; give the run directory or "
            f"one of its {FOLDER}/step-… directories"
        )
    if (path / MANIFEST).is_file():
        return _read(path)
    if (path / FOLDER).is_dir():
        saved = _checkpoints(path)
        if not saved:
            raise UserError(f"{path}: the run has not saved a checkpoint yet")
        try:
            return _read(saved[-1])
        except UserError as error:
            if len(saved) == 1:
                raise
            raise UserError(f"{error}; the checkpoint before it is {saved[-2]}") from error
    raise UserError(f"{path}: neither a run directory (it has no {FOLDER}/) nor a checkpoint (it has no {MANIFEST})")


def load_model(checkpoint: Checkpoint, device: torch.device) -> MeanShift:
    """The model of a checkpoint, in train mode, on `device`. A missing or unexpected weight is an error.

    Raises:
        UserError: if the weights do not fit the config, or the file is damaged.
    """
    model = build_model(checkpoint.config.model, seed=0)
    try:
        model.load_state_dict(checkpoint.tensors("model"), strict=True)
    except RuntimeError as error:
        complaint = " ".join(str(error).split())
        raise UserError(
            f"{checkpoint.path}: the weights do not fit the config saved beside them: {complaint}"
        ) from error
    return model.to(device)


def load_bank(checkpoint: Checkpoint, device: torch.device) -> Bank:
    """The bank of a checkpoint, on `device`.

    Raises:
        UserError: if the saved bank does not fit the config, its kind cannot be searched on `device`, or the file is
            damaged.
    """
    state = checkpoint.tensors("bank")
    config = checkpoint.config.bank
    if config.kind == "flat":
        config = config.model_copy(update={"engine": "auto"})  # the run's may not exist here
    try:
        dim = state["embeddings"].shape[1]
    except (KeyError, IndexError) as error:
        raise UserError(_damaged(checkpoint.path, f"bank.safetensors holds no bank: {error}")) from error
    try:
        bank = create_bank(config, dim=dim, device=device, images=checkpoint.dataset_size)
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: its bank cannot be searched on {device}: {error}") from error
    try:
        bank.load_state_dict(state)
    except (KeyError, ValueError) as error:
        raise UserError(_damaged(checkpoint.path, f"bank.safetensors holds no bank: {error}")) from error
    return bank


def _read(path: Path) -> Checkpoint:
    """Read a manifest and compare the files with it."""
    manifest = _manifest(path)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: {MANIFEST} is not that of an msf-faiss checkpoint")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path}: the checkpoint has format version {manifest.get('version')}, this msf-faiss reads {VERSION}; "
            "use the release that wrote it"
        )
    with _manifest_errors(path):
        for name, file in manifest["files"].items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found is None:
                raise UserError(_damaged(path, f"{name} is missing"))
            if found != file["bytes"]:
                raise UserError(_damaged(path, f"{name} has {found:,} bytes instead of {file['bytes']:,}"))
        return Checkpoint(
            path=path,
            step=int(manifest["step"]),
            epoch=float(manifest["epoch"]),
            config=Config.model_validate(manifest["config"]),
            run_dir=path.parent.parent if path.parent.name == FOLDER else None,
            dataset_size=int(manifest["dataset_size"]),
            files={name: file["sha256"] for name, file in manifest["files"].items()},
        )


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(_damaged(path, f"{MANIFEST} cannot be read ({error})")) from error
    if not isinstance(manifest, dict):
        raise UserError(_damaged(path, f"{MANIFEST} holds no object"))
    return manifest


@contextlib.contextmanager
def _manifest_errors(path: Path) -> Iterator[None]:
    """Turn what a hand-edited or foreign manifest causes into words."""
    try:
        yield
    except UserError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        place = dotted(key_of(first["loc"]))
        raise UserError(_damaged(path, f"its config does not fit this msf-faiss: {place}: {first['msg']}")) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_damaged(path, f"{MANIFEST} lacks or garbles {error}")) from error


def _checkpoints(run_dir: Path) -> list[Path]:
    """Directories of a run's checkpoints, the newest last."""
    return sorted((path for path in (run_dir / FOLDER).glob("step-*") if path.is_dir()), key=_step_of)


def _step_of(path: Path) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _replace(temporary: Path, final: Path) -> None:
    """Rename; a damaged checkpoint of the same step, from before a resume, gives way only once the new one is whole."""
    if final.exists():
        aside = temporary.with_name(f"{temporary.name}-replaced")
        final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        temporary.rename(final)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, what: str) -> str:
    return f"{path}: the checkpoint is damaged: {what}"


def _cannot_save(run_dir: Path, step: int, error: Exception) -> str:
    full = (isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}) or "No space left" in str(error)
    why = "the disk is full" if full else str(error)
    remedy = "make room" if full else "make it writable"
    saved = _checkpoints(run_dir)
    last = f"the last good checkpoint is {saved[-1]}" if saved else "no earlier checkpoint exists"
    return (
        f"{run_dir / FOLDER}: cannot save step {step}: {why}; {remedy} and continue the run with --resume auto ({last})"
    )
