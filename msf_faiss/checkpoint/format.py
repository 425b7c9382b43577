"""Checkpoints on disk: their layout, and how they are found and verified before anything is read from them.

    RUN/checkpoints/step-00001234/
        manifest.json          step, epoch, config and versions; size and SHA-256 of each file below; its own SHA-256
        model.safetensors      online encoder, predictor and target encoder: parameters and BatchNorm statistics
        optimizer.safetensors  momentum buffers, by parameter
        bank.safetensors       the ring, its ids and its counter; a bank sharded over W ranks has a file for each rank,
                               bank-00000-of-0000W.safetensors and so on
        rng.safetensors        state of torch's random number generators
        data.safetensors       names and labels of the training images, see `images`
        monitor.safetensors    what the monitors have accumulated since the last progress event
    RUN/checkpoints/damaged-step-00001234/   a checkpoint that failed verification: renamed, never deleted

Nothing is pickled, so loading a checkpoint executes no code.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import ValidationError
from torch import Tensor

from msf_faiss.checkpoint.hold import Hold
from msf_faiss.config import Config, NarrowBackbone
from msf_faiss.config.sections import dotted, key_of
from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.errors import UserError
from msf_faiss.files import kind_of

FORMAT = "msf-faiss checkpoint"
VERSION = 4
_READ_VERSIONS = (3, VERSION)  # 3: without data.safetensors; see also `_config_of`
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
PREFIX = "step-"
ENDING = ".safetensors"
_ATTEMPTS = 5  # to find the newest checkpoint of a run that saves and deletes meanwhile

Tensors = dict[str, Tensor]


class DamagedCheckpointError(UserError):
    """A checkpoint is not what was saved; an older one may be intact."""


class GoneCheckpointError(UserError):
    """A checkpoint was deleted since it was found; a training run has a newer one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose manifest is intact and whose files have the right sizes."""

    path: Path
    step: int  # completed steps
    epoch: float  # completed epochs
    config: Config
    run_dir: Path | None  # None: the checkpoint lies outside a run directory
    dataset_size: int  # training images, unreadable ones included
    origin: str | None  # the checkpoint of another run that this run started from
    origin_seal: str | None  # SHA-256 of its manifest; None: no origin, or saved before version 4
    seal: str  # SHA-256 of the own manifest
    files: Mapping[str, str]  # name -> SHA-256
    verified: bool = False  # whether every file has been compared with its SHA-256
    hold: object = field(default=None, compare=False, repr=False)  # see `hold.Hold`

    @property
    def bank_files(self) -> list[str]:
        """Names, without ending, of the bank's files: one for each shard, in order."""
        return sorted(name.removesuffix(ENDING) for name in self.files if name.startswith("bank"))

    def verify(self, names: Iterable[str]) -> None:
        """Compare files with their SHA-256.

        Raises:
            DamagedCheckpointError: if one differs, is missing or cannot be read.
            UserError: if one is not readable by this user.
        """
        for name in names:
            with _read_errors(self.path, name):
                if sha256_of(self.path / name) != self.files[name]:
                    raise DamagedCheckpointError(describe_damage(self.path, f"{name}: its SHA-256 differs"))

    def tensors(self, name: str) -> Tensors:
        """The tensors of the file `name`.safetensors, on the CPU; the file is verified first.

        Raises:
            UserError: if the file is damaged, or is not a safetensors file.
        """
        file = name + ENDING
        if file not in self.files:
            raise DamagedCheckpointError(describe_damage(self.path, f"{MANIFEST} does not list {file}"))
        if not self.verified:
            self.verify([file])
        with _read_errors(self.path, file):
            return safetensors.torch.load_file(self.path / file)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The directories of a run's checkpoints, oldest first.

    Raises:
        UserError: if the file system refuses access to `run_dir`.
    """
    if kind_of(run_dir / FOLDER) != "folder":
        return []
    return sorted((path for path in (run_dir / FOLDER).glob(f"{PREFIX}*") if path.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's directory; -1 if there is none."""
    number = path.name.removeprefix(PREFIX)
    return int(number) if number.isdigit() else -1


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the newest one of the run at `path`. Only its manifest is read.

    A run that trains meanwhile does not delete the checkpoint while the returned object exists.

    Raises:
        UserError: if there is no checkpoint, it is damaged, or it is not one of msf-faiss.
    """
    kind = kind_of(path)
    if kind is None and path.name.startswith(PREFIX) and kind_of(path.parent) == "folder":
        raise GoneCheckpointError(_gone(path))
    if kind is None:
        raise UserError(f"{path}: no such run directory or checkpoint; give the directory that `pretrain --out` named")
    if path.name == MANIFEST:
        path, kind = path.parent, "folder"
    if kind != "folder":
        raise UserError(
            f"{path}: a file, but a checkpoint of msf-faiss is a directory; give the run directory or "
            f"one of its {FOLDER}/{PREFIX}… directories"
        )
    if (path / MANIFEST).is_file():
        return _read_manifest(path)
    if not (path / FOLDER).is_dir():
        raise UserError(f"{path}: neither a run directory (no {FOLDER}/ in it) nor a checkpoint (no {MANIFEST} in it)")
    for _ in range(_ATTEMPTS):
        saved = list_checkpoints(path)
        if not saved:
            raise UserError(f"{path}: the run has not saved a checkpoint yet; wait for its first one")
        try:
            return _read_manifest(saved[-1])
        except GoneCheckpointError as error:
            gone = error
        except UserError as error:
            if len(saved) == 1:
                raise
            raise UserError(f"{error}; the checkpoint before it is {saved[-2]}") from error
    raise gone


def find_newest_valid(run_dir: Path, ranks: Ranks = ALONE) -> tuple[Checkpoint, dict[Path, str]]:
    """The newest checkpoint of a run that passes full verification. All ranks take part and share the reading.

    Returns:
        The checkpoint, and for each newer one that failed, what is wrong with it.

    Raises:
        UserError: if every checkpoint is damaged, or one cannot be read for another reason.
    """
    for _ in range(_ATTEMPTS):
        damaged: dict[Path, str] = {}
        for path in reversed(ranks.broadcast_object(list_checkpoints(run_dir))):
            error: UserError | None = None
            try:
                checkpoint = _read_manifest(path)
                checkpoint.verify(sorted(checkpoint.files)[ranks.rank :: ranks.size])
            except (DamagedCheckpointError, GoneCheckpointError) as problem:
                error = problem
            errors = [each for each in ranks.gather_objects(error) if each is not None]
            if not errors:
                return replace(checkpoint, verified=True), damaged
            if any(isinstance(each, GoneCheckpointError) for each in errors):
                break  # the run is training and has saved newer ones
            damaged[path] = str(errors[0])
        else:
            break
    raise UserError(
        f"{run_dir}: every checkpoint of the run is damaged; nothing was changed. Restore one from a backup, or start"
        " a new run with another --out:\n  " + "\n  ".join(damaged.values())
    )


def describe_damage(path: Path, problem: str) -> str:
    """The message for a checkpoint that is not what was saved."""
    return f"{path}: the checkpoint is damaged: {problem}"


def _gone(path: Path) -> str:
    return (
        f"{path}: there is no such checkpoint, or not any more: a run keeps its newest ones (checkpoint.keep_last). "
        "Start the command again, or name another checkpoint"
    )


def seal_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, its own `sha256` left out: layout and blanks do not count."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest, and compare the names and sizes of its files."""
    with _read_errors(path, MANIFEST):
        hold = Hold(path / MANIFEST)
    manifest = _load_sealed(path)
    files = _listed_files(path, manifest)
    for name, file in files.items():
        with _read_errors(path, name):
            size = (path / name).stat().st_size
        if size != file["bytes"]:
            raise DamagedCheckpointError(
                describe_damage(path, f"{name} has {size:,} bytes instead of {file['bytes']:,}")
            )
    with _manifest_errors(path):
        return Checkpoint(
            path=path,
            step=int(manifest["step"]),
            epoch=float(manifest["epoch"]),
            config=_config_of(manifest),
            run_dir=path.parent.parent if path.parent.name == FOLDER else None,
            dataset_size=int(manifest["dataset_size"]),
            origin=manifest["origin"],
            origin_seal=manifest.get("origin_sha256"),
            seal=manifest["sha256"],
            files={name: file["sha256"] for name, file in files.items()},
            hold=hold,
        )


def _config_of(manifest: dict[str, Any]) -> Config:
    """Before version 4, `model.dim: null` was a quarter of the features, however few."""
    config = Config.model_validate(manifest["config"])
    model, backbone = config.model, config.model.backbone
    if manifest["version"] == 3 and model.dim is None and isinstance(backbone, NarrowBackbone):
        quarter = max(1, backbone.width * 2 ** (len(backbone.depths) - 1) // 4)
        return config.model_copy(update={"model": model.model_copy(update={"dim": quarter})})
    return config


def _load_sealed(path: Path) -> dict[str, Any]:
    """The content of a manifest, if it is intact and of this version."""
    try:
        with _read_errors(path, MANIFEST):
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DamagedCheckpointError(describe_damage(path, f"{MANIFEST} is not JSON ({error})")) from error
    if not isinstance(manifest, dict):
        raise DamagedCheckpointError(describe_damage(path, f"{MANIFEST} is not a JSON object"))
    intact = manifest.get("sha256") == seal_of(manifest)
    # A damaged manifest may seem to be of another format or version: only an intact one is believed.
    if manifest.get("format") != FORMAT and (intact or "files" not in manifest):
        raise UserError(f"{path}: its {MANIFEST} is not that of an msf-faiss checkpoint; give another directory")
    if manifest.get("version") not in _READ_VERSIONS and (intact or "sha256" not in manifest):
        raise UserError(
            f"{path}: a checkpoint of format version {manifest.get('version')}, but this msf-faiss reads version "
            f"{VERSION}; use the release that wrote it, or train again"
        )
    if not intact:
        raise DamagedCheckpointError(describe_damage(path, f"{MANIFEST}: its SHA-256 differs"))
    return manifest


def _listed_files(path: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that a manifest lists; any other file in the directory is refused."""
    with _manifest_errors(path):
        files: dict[str, dict[str, Any]] = dict(manifest["files"].items())
        strange = sorted(name for name in files if not re.fullmatch(rf"[a-z0-9-]+{re.escape(ENDING)}", name))
    with _read_errors(path, "."):
        strange += sorted(
            entry.name for entry in path.iterdir() if entry.name not in {MANIFEST, *files} and entry.name[0] != "."
        )
    if strange:
        raise UserError(
            f"{path}: refused, because {', '.join(strange[:3])} {'does' if len(strange) == 1 else 'do'} not belong in "
            f"a checkpoint ({MANIFEST} and the *{ENDING} files that it lists); no file was opened"
        )
    return files


@contextlib.contextmanager
def _manifest_errors(path: Path) -> Iterator[None]:
    """Turn what a manifest of another program or release causes into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        place = dotted(key_of(first["loc"]))
        raise UserError(f"{path}: its config is not one of this msf-faiss: {place}: {first['msg']}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(describe_damage(path, f"{MANIFEST}: missing or malformed: {error}")) from error


@contextlib.contextmanager
def _read_errors(path: Path, name: str) -> Iterator[None]:
    """Turn what the disk or foreign content causes into a `UserError` that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        if not path.exists():
            raise GoneCheckpointError(_gone(path)) from error
        raise DamagedCheckpointError(describe_damage(path, f"{name} is missing")) from error
    except PermissionError as error:
        raise UserError(f"{path / name}: cannot be read: permission denied; make it readable") from error
    except OSError as error:
        raise DamagedCheckpointError(describe_damage(path, f"{name} cannot be read ({error.strerror})")) from error
    except safetensors.SafetensorError as error:
        if _is_pickle(path / name):
            raise UserError(
                f"{path / name}: refused, because it is a pickle, which can execute code when loaded; it was not opened"
            ) from error
        raise UserError(describe_damage(path, f"{name} is not a safetensors file ({error})")) from error


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as torch.save (a zip file) or pickle write it."""
    with path.open("rb") as file:
        begin = file.read(2)
    return begin == b"PK" or (begin[:1] == b"\x80" and begin[1:] <= b"\x05")
