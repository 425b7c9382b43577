"""The folder of an export, written atomically: weights, model card, and the same facts as JSON.

RUN/exports/timm-online-step-00001234/
    model.safetensors, config.json     the files of the format
    README.md                          the model card
    msf-faiss.json                     its facts for programs, and the SHA-256 of each file
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

import msf_faiss
from msf_faiss.embeddings.encoder import TrainedEncoder
from msf_faiss.errors import UserError
from msf_faiss.evaluate.results import FOLDER as RESULTS
from msf_faiss.evaluate.results import Result, load_results
from msf_faiss.export.card import render_card
from msf_faiss.export.formats import Format, check_exportable, describe_architecture
from msf_faiss.export.onnx_file import OPSET, write_onnx
from msf_faiss.export.safetensors_file import write_safetensors
from msf_faiss.export.torchvision_timm import write_timm, write_torchvision
from msf_faiss.files import kind_of
from msf_faiss.text import printable

FOLDER = "exports"
_FACTS = "msf-faiss.json"
_CARD = "README.md"
FORMAT = "msf-faiss export"
VERSION = 1

_IDENTITY = ("export_format", "encoder", "architecture", "checkpoint")
_LIBRARIES: dict[Format, tuple[str, ...]] = {
    "torchvision": ("torchvision",),
    "timm": ("safetensors",),
    "safetensors": ("safetensors",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
}


def export_encoder(encoder: TrainedEncoder, format: Format, out: Path | None = None, *, force: bool = False) -> Path:
    """Write an encoder and its model card to a folder.

    Args:
        encoder: see `embeddings.encoder.load_encoder`.
        format: of the weights.
        out: the folder; None: RUN/exports/FORMAT-ENCODER-step-N.
        force: replace an export of other weights, or one whose files were edited.

    Returns:
        The folder.

    Raises:
        UserError: if the format cannot hold the encoder or needs a library that is missing; if `out` contains anything
            that would be lost; or if it cannot be written, in which case nothing is left behind.
    """
    check_exportable(encoder, format)
    out = out or _default_folder(encoder, format)
    results = _results(encoder)
    facts = _facts(encoder, format, results)
    _check_replaceable(out, facts, force=force)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        _write(encoder, format, facts, results, temporary)
        _publish(out, temporary)
    except OSError as error:
        raise UserError(
            f"{printable(out)}: cannot write the export: {error.strerror or error}; free some space, or name another "
            "folder with --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def strip_folders(value: Any) -> Any:
    """A JSON value in which each absolute path is replaced by its last part: folders of a machine are private."""
    if isinstance(value, Mapping):
        return {name: strip_folders(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [strip_folders(each) for each in value]
    if isinstance(value, str):
        for path in (PurePosixPath(value), PureWindowsPath(value)):
            if path.is_absolute():
                return path.name
    return value


def _default_folder(encoder: TrainedEncoder, format: Format) -> Path:
    checkpoint = encoder.checkpoint
    if checkpoint.run_dir is None:
        raise UserError(
            f"{printable(checkpoint.path)}: the checkpoint lies outside a run; name a folder for the export with --out"
        )
    head = "-projector" if encoder.projector else ""
    return checkpoint.run_dir / FOLDER / f"{format}-{encoder.name}{head}-step-{checkpoint.step:08d}"


def _results(encoder: TrainedEncoder) -> list[Result]:
    """The run's evaluation results for these weights and for baselines, oldest first."""
    checkpoint = encoder.checkpoint
    if checkpoint.run_dir is None:
        return []
    weights = checkpoint.files["model.safetensors"]
    return [
        replace(result, protocol=strip_folders(result.protocol))
        for result in load_results(checkpoint.run_dir / RESULTS)
        if result.encoder in ("untrained", "pixels") or (result.encoder, result.weights) == (encoder.name, weights)
    ]


def _facts(encoder: TrainedEncoder, format: Format, results: Sequence[Result]) -> dict[str, Any]:
    """The content of msf-faiss.json, but for versions and files, which are added when they are known."""
    checkpoint = encoder.checkpoint
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "export_format": format,
        "encoder": encoder.name,
        "architecture": describe_architecture(encoder),
        "dimensions": encoder.dim,
        "input": {
            "size": encoder.image_size,
            "resize": encoder.resize,
            "interpolation": "bilinear, antialiased",
            "mean": list(encoder.mean),
            "std": list(encoder.std),
        },
        "checkpoint": {
            "name": checkpoint.path.name,
            "step": checkpoint.step,
            "epoch": checkpoint.epoch,
            "sha256": checkpoint.files["model.safetensors"],
        },
        "training": {"images": checkpoint.dataset_size, "config": checkpoint.config.model_dump(mode="json")},
        "results": [result.to_json() for result in results],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return json.loads(json.dumps(strip_folders(facts)))  # type: ignore[no-any-return]  # as it is read back


def _write(
    encoder: TrainedEncoder, format: Format, facts: dict[str, Any], results: Sequence[Result], folder: Path
) -> None:
    metadata = {name: facts[name] for name in ("architecture", "encoder", "dimensions", "input", "checkpoint")}
    match format:
        case "torchvision":
            write_torchvision(encoder, folder)
        case "timm":
            write_timm(encoder, folder)
        case "safetensors":
            write_safetensors(encoder, folder, metadata)
        case "onnx":
            facts["onnx"] = {"opset": OPSET, "relative_difference": write_onnx(encoder, folder, metadata)}
    facts["versions"] = {
        "msf_faiss": msf_faiss.__version__,
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in _LIBRARIES[format]},
        "python": sys.version.split()[0],
    }
    facts["files"] = {path.name: _describe_file(path) for path in sorted(folder.iterdir())}
    (folder / _CARD).write_text(render_card(encoder, format, facts, results), encoding="utf-8")
    facts["files"][_CARD] = _describe_file(folder / _CARD)
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _describe_file(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _check_replaceable(out: Path, facts: Mapping[str, Any], *, force: bool) -> None:
    """Check that `out` may be replaced: that it is missing, empty, or an unedited export of the same weights.

    With `force`, any export may be replaced, edited or not, but never files that no export wrote.

    Raises:
        UserError: if something would be lost.
    """
    name = printable(out)
    kind = kind_of(out, "name another folder with --out")
    if kind is None:
        return
    if kind != "folder":
        raise UserError(f"{name} is a file, but an export is a folder; name another folder with --out")
    found = {path.name: path for path in out.iterdir()}
    if not found:
        return
    old = _old_facts(out)
    known = {_FACTS, *old.get("files", {})}
    foreign = sorted(each for each, path in found.items() if each not in known or not path.is_file())
    if not old or foreign:
        raise UserError(
            f"{name} contains {printable(foreign[0] if foreign else _FACTS)}, which no export wrote; move it away, or "
            "name another folder with --out"
        )
    if force:
        return
    if any(old.get(key) != facts[key] for key in _IDENTITY):
        raise UserError(f"{name} contains another export; name another folder with --out, or replace it: --force")
    edited = [each for each in found.keys() - {_FACTS} if _describe_file(found[each]) != old["files"][each]]
    if edited:
        raise UserError(
            f"{name}: {edited[0]} was edited since the export; name another folder with --out, or replace it: --force"
        )


def _old_facts(out: Path) -> dict[str, Any]:
    """The facts of the export in `out`; empty if there is none."""
    try:
        facts = json.loads((out / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    usable = isinstance(facts, dict) and facts.get("format") == FORMAT and isinstance(facts.get("files"), dict)
    return facts if usable else {}


def _publish(out: Path, temporary: Path) -> None:
    """Rename the finished folder to `out`, in place of an older one."""
    if not out.exists():
        temporary.rename(out)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
