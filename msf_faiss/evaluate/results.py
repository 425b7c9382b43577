"""Results of evaluations: scores with their complete protocol, one JSON file each. No torch."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from msf_faiss.errors import UserError
from msf_faiss.files import kind_of, write_atomic

FOLDER = "results"
"""Name of the results folder in a run's directory."""
SUMMARY = "summary.json"
"""Name of the file with all results of a folder, see `summary`."""

EvalEncoder = Literal["online", "target", "weights", "untrained", "pixels"]
"""The online or target backbone of a checkpoint; the backbone of a plain state dict; the network before training; no
network, only the pixels of the centre view."""

EvaluationName = Literal["knn", "linear", "linear-fast", "semi-linear", "semi-fine-tune", "transfer"]

_FORMAT, _VERSION = "msf-faiss result", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One accuracy."""

    metric: str  # readable: "20-NN", "20-NN, T 0.07", "linear", "linear, top 5"
    accuracy: float  # 0..1
    correct: int | None  # images; None: the mean of the classes' accuracies
    images: int
    settings: Mapping[str, float | int | str | None]  # k and temperature, or top; the kind of mean; labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One evaluation of one encoder, identified by (evaluation, encoder, weights, protocol)."""

    evaluation: EvaluationName
    encoder: EvalEncoder
    checkpoint: str | None  # path, relative to the run if there is one; None: untrained
    weights: str | None  # SHA-256 of the model file; None: untrained
    step: int | None  # completed steps: 0 if untrained, None for pixels or if unknown
    epoch: float | None
    scores: tuple[Score, ...]
    protocol: Mapping[str, Any]  # "data" (config and sizes), "view", and all settings of the evaluation
    created: str  # ISO 8601, UTC
    device: str
    seconds: float
    versions: Mapping[str, str]

    @property
    def file_name(self) -> str:
        """The same for the same identity, and different for different ones."""
        step = f"-step-{self.step:08d}" if self.checkpoint and self.step is not None else ""
        identity = json.dumps([self.evaluation, self.encoder, self.weights, self.protocol], sort_keys=True)
        return f"{self.evaluation}-{self.encoder}{step}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}.json"

    def to_json(self) -> dict[str, Any]:
        """The content of the file, and of `--json`."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}


_ADAPTER = TypeAdapter(Result)


def prepare_folder(folder: Path) -> None:
    """Create the folder for results, and check, before hours of work, that it is writable.

    Raises:
        UserError: if it cannot be created or written.
    """
    kind_of(folder, "name another folder with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot create the folder for results: {error.strerror}; name another with --out"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: no permission to write results; name another folder with --out")


def save_result(result: Result, folder: Path) -> Path:
    """Write a result to `folder`, atomically; replaces an earlier result with the same identity.

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
    """The results in `folder`, oldest first; none if there is no such folder.

    Raises:
        UserError: if a JSON file in it is not a result.
    """
    results = (_load(path) for path in folder.glob("*.json") if path.name != SUMMARY)
    return sorted(results, key=lambda result: result.created)


def _load(path: Path) -> Result:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content.pop("format"), content.pop("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"not {_FORMAT!r}, version {_VERSION}")
        return _ADAPTER.validate_python(content)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a result of this version of msf-faiss ({_first_line(error)}); move it elsewhere"
        ) from error


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
