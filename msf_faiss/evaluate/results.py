"""What an evaluation found, with the complete protocol that produced it, on disk as one JSON file each. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from msf_faiss.errors import UserError
from msf_faiss.files import write_atomic

FOLDER = "results"
FORMAT = "msf-faiss result"
VERSION = 1
SUMMARY = "summary.json"
"""All results of a folder in one file, see `summary`."""

EncoderName = Literal["online", "target", "weights", "untrained", "pixels"]
"""Two backbones of a checkpoint; that of a plain state dict; the network as it was before the first step; no network,
only the centre view."""

EvaluationName = Literal["knn", "linear", "linear-fast", "semi-linear", "semi-fine-tune", "transfer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One accuracy."""

    metric: str  # for people: "20-NN", "20-NN, T 0.07", "linear", "linear, top 5"
    accuracy: float  # 0..1
    correct: int | None  # images; None: the mean of the classes' accuracies
    images: int
    settings: Mapping[str, float | int | str | None]  # for programs: k and temperature, or top, or the kind of mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One evaluation of one encoder. Equal (evaluation, encoder, weights, protocol) mean the same question."""

    evaluation: EvaluationName
    encoder: EncoderName
    checkpoint: str | None  # within the run, or the path of one outside; None: the weights come from no checkpoint
    weights: str | None  # SHA-256 of the checkpoint's model file
    step: int | None  # finished steps of the weights: 0 untrained, None for pixels and where it is not known
    epoch: float | None
    scores: tuple[Score, ...]
    protocol: Mapping[str, Any]  # "data": config and sizes; "view"; and all settings of the evaluation
    created: str  # ISO 8601, UTC
    device: str
    seconds: float
    versions: Mapping[str, str]

    @property
    def file_name(self) -> str:
        """The same for the same question, and different for different ones."""
        step = f"-step-{self.step:08d}" if self.checkpoint and self.step is not None else ""
        question = json.dumps([self.evaluation, self.encoder, self.weights, self.protocol], sort_keys=True)
        return f"{self.evaluation}-{self.encoder}{step}-{hashlib.sha256(question.encode()).hexdigest()[:8]}.json"

    def to_json(self) -> dict[str, Any]:
        """As it is written to disk and by `--json`."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


_ADAPTER = TypeAdapter(Result)


def prepare_folder(folder: Path) -> None:
    """Make the folder for results, before hours are spent on what goes into it.

    Raises:
        UserError: if it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot make this folder for the results: {error.strerror}; name another with --out"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot write the results there: no permission; name another folder with --out")


def save_result(result: Result, folder: Path) -> Path:
    """Write a result into `folder`, whole or not at all; an earlier answer to the same question gives way.

    Raises:
        UserError: if it cannot be written.
    """
    path = folder / result.file_name
    try:
        write_atomic(path, json.dumps(result.to_json(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot write the result: {error.strerror}; name another folder with --out") from error
    return path


def load_results(folder: Path) -> list[Result]:
    """The results in `folder`, the oldest first; none if there is no such folder.

    Raises:
        UserError: if a JSON file there is not a result.
    """
    found = (_load(path) for path in folder.glob("*.json") if path.name != SUMMARY)
    return sorted(found, key=lambda result: result.created)


def _load(path: Path) -> Result:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT or found.pop("version") != VERSION:
            raise ValueError("it has another format")
        return _ADAPTER.validate_python(found)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a result that this msf-faiss wrote ({_first_line(error)}); move it elsewhere"
        ) from error


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
