"""What the directory of a run tells about it; most of what is missing or broken stops no report."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msf_faiss.checkpoint.format import FOLDER as CHECKPOINTS
from msf_faiss.checkpoint.format import MANIFEST, find_checkpoint
from msf_faiss.config.load import load_config
from msf_faiss.errors import UserError
from msf_faiss.evaluate.comparison import Comparison, compare
from msf_faiss.evaluate.results import FOLDER as RESULTS
from msf_faiss.evaluate.results import Result, load_results
from msf_faiss.neighbors.inspection import inspect
from msf_faiss.neighbors.records import Inspection
from msf_faiss.report.metrics import Metrics, read_metrics
from msf_faiss.run.directory import CONFIG
from msf_faiss.run.metrics_file import METRICS
from msf_faiss.run.status import STATUS, Status, read_status

_QUERIES, _NEIGHBORS = 6, 8
_PAGES = {".html", ".png"}
_NEIGHBORS_FOLDER = "neighbors"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run as its directory shows it. Where a part could not be had, `missing` says why, by the part's name."""

    path: Path
    name: str  # short, and different from those of the other runs
    metrics: Metrics
    status: Status | None
    config: Mapping[str, Any] | None  # plain values
    results: Sequence[Result]
    comparisons: Sequence[Comparison]
    inspection: Inspection | None
    pages: Sequence[Path]  # that inspect-neighbors made
    origin: Mapping[str, str]  # what its checkpoints and results say of hardware and software
    missing: Mapping[str, str]  # config, status, results, neighbors


def read_runs(paths: Sequence[Path], *, neighbors: bool) -> list[RunRecord]:
    """The runs at `paths`, each once.

    Args:
        paths: directories of runs, whether they train, are finished, or have only begun.
        neighbors: look for those of a few queries in the newest checkpoint's bank.

    Raises:
        UserError: if there is no run at one of them, or its metrics cannot be read or have another format version.
    """
    different = list({path.resolve(): path for path in reversed(paths)}.values())[::-1]
    for path in different:
        if not path.is_dir():
            raise UserError(f"{path}: no such run directory; it is what `pretrain --out` named")
        if not any((path / name).exists() for name in (CONFIG, METRICS, STATUS)):
            raise UserError(
                f"{path}: no run there (it has no {CONFIG}); the run directory is what `pretrain --out` named"
            )
    return [
        _read(path, name, neighbors=neighbors) for path, name in zip(different, short_names(different), strict=True)
    ]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as make them different."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every setting by its dotted key, as a config file spells it."""
    found: dict[str, str] = {}
    for key, value in sorted(config.items(), key=lambda item: item[0] != "kind"):
        if isinstance(value, Mapping):
            found |= settings(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


def _read(path: Path, name: str, *, neighbors: bool) -> RunRecord:
    missing: dict[str, str] = {}
    try:
        metrics = read_metrics(path / METRICS)
    except OSError as error:
        raise UserError(f"{path / METRICS}: cannot be read: {error.strerror}") from error
    status = config = inspection = None
    results: list[Result] = []
    comparisons: list[Comparison] = []
    try:
        status = read_status(path)
    except UserError as error:
        missing["status"] = str(error)
    try:
        config = load_config(path / CONFIG).model_dump(mode="json")
    except UserError as error:
        missing["config"] = str(error)
    try:
        results = load_results(path / RESULTS)
        comparisons = compare(results)
    except UserError as error:
        missing["results"] = str(error)
    try:
        if neighbors:
            # On the CPU: six queries need no GPU, and a run that trains there may have left no memory.
            inspection = inspect(find_checkpoint(path), queries=_QUERIES, k=_NEIGHBORS)
    except UserError as error:
        missing["neighbors"] = str(error)
    return RunRecord(
        path=path,
        name=name,
        metrics=metrics,
        status=status,
        config=config,
        results=results,
        comparisons=comparisons,
        inspection=inspection,
        pages=sorted(page for page in (path / _NEIGHBORS_FOLDER).glob("*") if page.suffix in _PAGES),
        origin=_origin(path, status, results),
        missing=missing,
    )


def _origin(path: Path, status: Status | None, results: Sequence[Result]) -> dict[str, str]:
    """Hardware, software and times, as far as they were recorded."""
    facts: dict[str, str] = {}
    if status is not None and status.heartbeat is not None:
        beat = status.heartbeat
        facts["host"] = beat.host
        facts["last process began"] = moment(beat.started)
        facts["last word"] = moment(beat.time)
    if results:
        facts["evaluated on"] = ", ".join(dict.fromkeys(result.device for result in results))
        facts["evaluated with"] = _versions(results[-1].versions)
    manifest = _newest_manifest(path)
    if manifest:
        facts["newest checkpoint"] = f"step {manifest.get('step')}, {manifest.get('created')}"
        if isinstance(manifest.get("versions"), dict):
            facts["trained with"] = _versions(manifest["versions"])
        if manifest.get("origin"):
            facts["began from"] = str(manifest["origin"])
    return facts


def _newest_manifest(path: Path) -> dict[str, Any]:
    """Nothing is loaded by it, so that a damaged one may tell what it can."""
    found = (path / CHECKPOINTS).glob(f"step-*/{MANIFEST}")
    for manifest in sorted(found, key=lambda file: (len(file.parent.name), file.parent.name), reverse=True):
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            return content
    return {}


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def moment(seconds: float) -> str:
    """A time in Unix seconds for people, UTC."""
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"
