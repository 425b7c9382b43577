"""Checkpoints: directories that appear whole or not at all, and are verified before they are believed.

    RUN/checkpoints/step-00001234/
        manifest.json          step, epoch, config, versions; size and SHA-256 of each file below, and of itself
        model.safetensors      online encoder, predictor, target encoder; parameters and batch statistics
        optimizer.safetensors  momentum buffers, by parameter
        bank.safetensors       the ring, its ids and its counter; of a bank that is sharded over W ranks
                               bank-00000-of-0000W.safetensors and so on
        rng.safetensors        torch's generators
        monitor.safetensors    what was counted since the last report
    RUN/checkpoints/damaged-step-00001234/   what was found not to be what was saved, left for its owner to look at

Nothing is pickled, so nothing is executed by loading.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

import msf_faiss
from msf_faiss.config import Config
from msf_faiss.config.sections import dotted, key_of
from msf_faiss.distributed.ranks import Ranks
from msf_faiss.errors import UserError

FORMAT = "msf-faiss checkpoint"
VERSION = 2
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
_NAME = "step-"
_TEMPORARY = ".saving-"
_DAMAGED = "damaged-"
ENDING = ".safetensors"

Tensors = dict[str, Tensor]


class DamagedCheckpointError(UserError):
    """A checkpoint is not what was saved: an older one may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk whose manifest is what was written and whose files have the right sizes."""

    path: Path
    step: int  # finished steps
    epoch: float  # finished epochs
    config: Config
    run_dir: Path | None  # None: the checkpoint lies outside a run
    dataset_size: int  # images of the training set, unreadable ones included
    origin: str | None  # the checkpoint of another run that this run began from
    files: Mapping[str, str]  # name -> SHA-256
    verified: bool = False  # every file has been compared with its SHA-256

    @property
    def bank_files(self) -> list[str]:
        """Names (without ending) of the bank's shards, in their order; one of a bank that is not sharded."""
        return sorted(name.removesuffix(ENDING) for name in self.files if name.startswith("bank"))

    def verify(self, names: Iterable[str]) -> None:
        """Compare files of this checkpoint with their SHA-256.

        Raises:
            DamagedCheckpointError: if one is not what was saved.
            UserError: if one may not be read.
        """
        for name in names:
            with _reading(self.path, name):
                if _sha256(self.path / name) != self.files[name]:
                    raise DamagedCheckpointError(
                        damaged(self.path, f"{name} is not what was saved (its SHA-256 differs)")
                    )

    def tensors(self, name: str) -> Tensors:
        """The tensors of the file `name`.safetensors, on the CPU.

        Raises:
            UserError: if the file is not what was saved, or holds anything but tensors.
        """
        file = name + ENDING
        if file not in self.files:
            raise DamagedCheckpointError(damaged(self.path, f"{file} is not in its {MANIFEST}"))
        if not self.verified:
            self.verify([file])
        with _reading(self.path, file):
            return safetensors.torch.load_file(self.path / file)


def save_checkpoint(
    run_dir: Path,
    *,
    step: int,
    epoch: float,
    config: Config,
    dataset_size: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    origin: str | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Write a checkpoint of a run: into a temporary folder, synced to disk, then renamed. All ranks take part.

    Args:
        run_dir: the run's directory.
        step: finished steps.
        epoch: finished epochs.
        config: the effective config.
        dataset_size: images of the training set.
        tensors: for each file (without ending) that this rank writes, its tensors by name.
        origin: the checkpoint of another run that this run began from.
        ranks: that write together; None: this process alone.

    Returns:
        The checkpoint's directory.

    Raises:
        UserError: if the disk is full or cannot be written, at any rank; earlier checkpoints are intact, nothing
            half-written stays.
    """
    ranks = ranks or Ranks.alone()
    final = run_dir / FOLDER / f"{_NAME}{step:08d}"
    temporary = final.with_name(f"{_TEMPORARY}{final.name}")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "epoch": epoch,
        "dataset_size": dataset_size,
        "origin": origin,
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
        _together(ranks, lambda: _make_anew(temporary) if ranks.is_main else None)
        written = _together(ranks, lambda: [_write(temporary, name, tensors[name]) for name in tensors])
        manifest["files"] = dict(sorted(file for files in written for file in files))
        _together(ranks, lambda: _finish(temporary, final, manifest) if ranks.is_main else None)
    except OSError as error:
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


def remove_incomplete(run_dir: Path) -> None:
    """Delete what a killed process left of a checkpoint that it was writing."""
    for path in (run_dir / FOLDER).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def has_checkpoints(run_dir: Path) -> bool:
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
            f"one of its {FOLDER}/{_NAME}… directories"
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


def find_newest_valid(run_dir: Path, ranks: Ranks | None = None) -> tuple[Checkpoint, dict[Path, str]]:
    """The newest checkpoint of a run of which every byte is what was saved; all ranks take part and share the reading.

    Returns:
        It, and of each newer one what is wrong with it.

    Raises:
        UserError: if none is whole, or one is not readable for another reason than damage.
    """
    ranks = ranks or Ranks.alone()
    damaged: dict[Path, str] = {}
    for path in reversed(ranks.broadcast_object(_checkpoints(run_dir))):
        wrong = None
        try:
            checkpoint = _read(path)
            checkpoint.verify(sorted(checkpoint.files)[ranks.rank :: ranks.size])
        except DamagedCheckpointError as error:
            wrong = str(error)
        wrong = next((text for text in ranks.gather_objects(wrong) if text is not None), None)
        if wrong is None:
            return replace(checkpoint, verified=True), damaged
        damaged[path] = wrong
    raise UserError(
        f"{run_dir}: no checkpoint of the run is whole, and nothing was changed; bring one back from a copy, or start a"
        " new run with another --out:\n  " + "\n  ".join(damaged.values())
    )


def quarantine(path: Path) -> Path:
    """Rename a damaged checkpoint so that it counts no longer; nothing is deleted.

    Raises:
        UserError: if it cannot be renamed.
    """
    for number in itertools.count(1):
        aside = path.with_name(f"{_DAMAGED}{path.name}" + (f"-{number}" if number > 1 else ""))
        if not aside.exists():
            break
    try:
        return path.rename(aside)
    except OSError as error:
        raise UserError(f"{path}: is damaged and cannot be set aside: {error.strerror}; make it writable") from error


T = TypeVar("T")


def _together(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """What `work` returns on each rank; where it fails on one, it fails on all, so that none waits for ever.

    Raises:
        OSError: what the first rank that failed did.
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


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, int | str]]:
    """Write a file of tensors to disk; its name, and what the manifest says of it."""
    path = folder / f"{name}{ENDING}"
    safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    _sync(path)
    return path.name, {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _finish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and make the checkpoint appear."""
    manifest["sha256"] = _digest(manifest)
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _sync(temporary / MANIFEST)
    _sync(temporary)
    temporary.rename(final)
    _sync(final.parent)


def _read(path: Path) -> Checkpoint:
    """Read a manifest and compare the names and sizes of the files with it."""
    manifest = _manifest(path)
    files = _files(path, manifest)
    for name, file in files.items():
        with _reading(path, name):
            size = (path / name).stat().st_size
        if size != file["bytes"]:
            raise DamagedCheckpointError(damaged(path, f"{name} has {size:,} bytes instead of {file['bytes']:,}"))
    with _manifest_errors(path):
        return Checkpoint(
            path=path,
            step=int(manifest["step"]),
            epoch=float(manifest["epoch"]),
            config=Config.model_validate(manifest["config"]),
            run_dir=path.parent.parent if path.parent.name == FOLDER else None,
            dataset_size=int(manifest["dataset_size"]),
            origin=manifest["origin"],
            files={name: file["sha256"] for name, file in files.items()},
        )


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, if it is what was written and this release reads its format."""
    try:
        with _reading(path, MANIFEST):
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DamagedCheckpointError(damaged(path, f"{MANIFEST} cannot be read ({error})")) from error
    if not isinstance(manifest, dict):
        raise DamagedCheckpointError(damaged(path, f"{MANIFEST} holds no object"))
    whole = manifest.get("sha256") == _digest(manifest)
    if manifest.get("format") != FORMAT and (whole or "files" not in manifest):
        raise UserError(f"{path}: {MANIFEST} is not that of an msf-faiss checkpoint")
    if manifest.get("version") != VERSION and (whole or manifest.get("version") == 1):
        raise UserError(
            f"{path}: the checkpoint has format version {manifest.get('version')}, this msf-faiss reads {VERSION}; "
            "use the release that wrote it"
        )
    if not whole:
        raise DamagedCheckpointError(damaged(path, f"{MANIFEST} is not what was saved (its SHA-256 differs)"))
    return manifest


def _files(path: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that a manifest lists; others beside them are refused."""
    with _manifest_errors(path):
        files: dict[str, dict[str, Any]] = dict(manifest["files"].items())
        strange = sorted(name for name in files if not re.fullmatch(rf"[a-z0-9-]+{re.escape(ENDING)}", name))
    with _reading(path, "."):
        strange += sorted(
            found.name for found in path.iterdir() if found.name not in {MANIFEST, *files} and found.name[0] != "."
        )
    if strange:
        raise UserError(
            f"{path}: refused: {', '.join(strange[:3])} {'does' if len(strange) == 1 else 'do'} not belong into a"
            f" checkpoint, which holds {MANIFEST} and the *{ENDING} files in it alone; nothing of it was opened"
        )
    return files


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says but for its own `sha256`."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def _manifest_errors(path: Path) -> Iterator[None]:
    """Turn what a hand-made manifest causes into words."""
    try:
        yield
    except UserError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        place = dotted(key_of(first["loc"]))
        raise UserError(f"{path}: its config does not fit this msf-faiss: {place}: {first['msg']}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(damaged(path, f"{MANIFEST} lacks or garbles {error}")) from error


@contextlib.contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    """Turn what the disk and foreign contents cause into words."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedCheckpointError(damaged(path, f"{name} is missing")) from error
    except PermissionError as error:
        raise UserError(f"{path / name}: cannot be read: permission denied; make it readable") from error
    except OSError as error:
        raise DamagedCheckpointError(damaged(path, f"{name} cannot be read ({error.strerror})")) from error
    except safetensors.SafetensorError as error:
        if _is_pickle(path / name):
            raise UserError(
                f"{path / name}: refused: it is a pickle, which can execute code when it is loaded; it was not opened"
            ) from error
        raise UserError(damaged(path, f"{name} holds no tensors ({error})")) from error


def _is_pickle(path: Path) -> bool:
    """Whether a file that holds no tensors looks like torch.save's or pickle's."""
    with path.open("rb") as file:
        begins = file.read(2)
    return begins == b"PK" or (begins[:1] == b"\x80" and begins[1:] <= b"\x05")


def _checkpoints(run_dir: Path) -> list[Path]:
    """Directories of a run's checkpoints, the newest last."""
    return sorted((path for path in (run_dir / FOLDER).glob(f"{_NAME}*") if path.is_dir()), key=_step_of)


def _step_of(path: Path) -> int:
    number = path.name.removeprefix(_NAME)
    return int(number) if number.isdigit() else -1


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(path: Path, what: str) -> str:
    """In words, that a checkpoint is not what was saved."""
    return f"{path}: the checkpoint is damaged: {what}"


def _cannot_save(run_dir: Path, step: int, error: OSError) -> str:
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    why = "the disk is full" if full else error.strerror or str(error)
    remedy = "make room" if full else "make it writable"
    saved = _checkpoints(run_dir)
    last = f"the last good checkpoint is {saved[-1]}" if saved else "no earlier checkpoint exists"
    return f"{run_dir / FOLDER}: cannot save step {step}: {why}; {remedy} and start the same command again ({last})"
