"""The folder of an export: weights, the model card, and its facts for programs; whole or not there at all.

RUN/exports/timm-online-step-00001234/
    model.safetensors, config.json     or what else the format has
    README.md                          the model card
    msf-faiss.json                     the same facts for programs, and the SHA-256 of each file
"""

from __future__ import annotations

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
from msf_faiss.errors import UserError
from msf_faiss.evaluate.results import FOLDER as RESULTS
from msf_faiss.evaluate.results import Result, load_results
from msf_faiss.export.card import render_card
from msf_faiss.export.encoder import ExportedEncoder, Format, refuse_unfit
from msf_faiss.export.formats import write_timm, write_torchvision
from msf_faiss.export.onnx_file import OPSET, write_onnx
from msf_faiss.export.safetensors_file import write_safetensors
from msf_faiss.text import printable

FOLDER = "exports"
FACTS = "msf-faiss.json"
CARD = "README.md"
FORMAT = "msf-faiss export"
VERSION = 1

_IDENTITY = ("export_format", "encoder", "architecture", "checkpoint")
_LIBRARIES: dict[Format, tuple[str, ...]] = {
    "torchvision": ("torchvision",),
    "timm": ("safetensors",),
    "safetensors": ("safetensors",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
}


def default_folder(encoder: ExportedEncoder, format: Format) -> Path:
    """RUN/exports/FORMAT-ENCODER-step-N.

    Raises:
        UserError: if the checkpoint lies outside a run.
    """
    checkpoint = encoder.checkpoint
    if checkpoint.run_dir is None:
        raise UserError(f"{printable(checkpoint.path)}: lies outside a run; name a folder for the export with --out")
    head = "-projector" if encoder.projector else ""
    return checkpoint.run_dir / FOLDER / f"{format}-{encoder.name}{head}-step-{checkpoint.step:08d}"


def export_encoder(encoder: ExportedEncoder, format: Format, out: Path | None = None, *, force: bool = False) -> Path:
    """Write an encoder with its card into a folder of its own.

    Args:
        encoder: what to export.
        format: of the weights.
        out: the folder; None: `default_folder`.
        force: replace an export of other weights, or one whose files were changed since.

    Returns:
        The folder.

    Raises:
        UserError: if the format has no place for the encoder or lacks its library; if `out` holds something that would
            be lost; or if it cannot be written, and then nothing is left of it.
    """
    refuse_unfit(encoder, format)
    out = out or default_folder(encoder, format)
    results = _results(encoder)
    facts = _facts(encoder, format, results)
    _refuse_loss(out, facts, force=force)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        _write(encoder, format, facts, results, temporary)
        _replace(out, temporary)
    except OSError as error:
        raise UserError(
            f"{printable(out)}: cannot write the export: {error.strerror or error}; make room there, or choose another "
            "--out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _results(encoder: ExportedEncoder) -> list[Result]:
    """What the evaluations found for these weights and for what training never touched, the oldest first."""
    checkpoint = encoder.checkpoint
    if checkpoint.run_dir is None:
        return []
    weights = checkpoint.files["model.safetensors"]
    return [
        replace(result, protocol=without_folders(result.protocol))
        for result in load_results(checkpoint.run_dir / RESULTS)
        if result.encoder in ("untrained", "pixels") or (result.encoder, result.weights) == (encoder.name, weights)
    ]


def without_folders(value: Any) -> Any:
    """A JSON value with the last part of each absolute path in it: where data lay on a machine is nobody else's."""
    if isinstance(value, Mapping):
        return {name: without_folders(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(each) for each in value]
    if isinstance(value, str):
        for path in (PurePosixPath(value), PureWindowsPath(value)):
            if path.is_absolute():
                return path.name
    return value


def _facts(encoder: ExportedEncoder, format: Format, results: Sequence[Result]) -> dict[str, Any]:
    """What the export is, for programs; its files are still missing."""
    checkpoint, views = encoder.checkpoint, encoder.views
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "export_format": format,
        "encoder": encoder.name,
        "architecture": encoder.architecture,
        "dimensions": encoder.dim,
        "input": {
            "size": views.size,
            "resize": views.resize,
            "interpolation": "bilinear, antialiased",
            "mean": list(views.mean),
            "std": list(views.std),
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
    return json.loads(json.dumps(without_folders(facts)))  # type: ignore[no-any-return]  # as it is read back


def _write(
    encoder: ExportedEncoder, format: Format, facts: dict[str, Any], results: Sequence[Result], folder: Path
) -> None:
    brief = {name: facts[name] for name in ("architecture", "encoder", "dimensions", "input", "checkpoint")}
    match format:
        case "torchvision":
            write_torchvision(encoder, folder)
        case "timm":
            write_timm(encoder, folder)
        case "safetensors":
            write_safetensors(encoder, folder, brief)
        case "onnx":
            facts["onnx"] = {"opset": OPSET, "relative_difference": write_onnx(encoder, folder, brief)}
    facts["versions"] = {
        "msf_faiss": msf_faiss.__version__,
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in _LIBRARIES[format]},
        "python": sys.version.split()[0],
    }
    facts["files"] = {path.name: _described(path) for path in sorted(folder.iterdir())}
    (folder / CARD).write_text(render_card(encoder, format, facts, results), encoding="utf-8")
    facts["files"][CARD] = _described(folder / CARD)
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _described(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _refuse_loss(out: Path, facts: Mapping[str, Any], *, force: bool) -> None:
    """Refuse to replace anything but an unchanged export of the same weights; with `force`, anything but an export and
    what was changed in its files.

    Raises:
        UserError: if something would be lost.
    """
    name = printable(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{name} is a file; an export is a folder: choose another --out")
    found = {path.name: path for path in out.iterdir()}
    if not found:
        return
    old = _old_facts(out)
    known = {FACTS, *old.get("files", {})}
    strange = sorted(each for each, path in found.items() if each not in known or not path.is_file())
    if not old or strange:
        what = strange[0] if strange else FACTS
        raise UserError(
            f"{name}: holds {printable(what)}, which no export wrote; move it elsewhere, or choose another --out"
        )
    if force:
        return
    if any(old.get(key) != facts[key] for key in _IDENTITY):
        raise UserError(f"{name}: holds another export; choose another --out, or replace it: --force")
    changed = [each for each in found.keys() - {FACTS} if _described(found[each]) != old["files"][each]]
    if changed:
        raise UserError(
            f"{name}: {changed[0]} was changed since it was written; choose another --out, or replace it: --force"
        )


def _old_facts(out: Path) -> dict[str, Any]:
    """The facts of an export in `out`; none if there is no such."""
    try:
        facts = json.loads((out / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    usable = isinstance(facts, dict) and facts.get("format") == FORMAT and isinstance(facts.get("files"), dict)
    return facts if usable else {}


def _replace(out: Path, temporary: Path) -> None:
    """Let the finished folder take its name, and an older one give way."""
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
