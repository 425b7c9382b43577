"""Everything in a run directory that a report shows. Most missing or damaged parts are reported, not fatal."""

import datetime
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from msf_faiss.checkpoint.format import FOLDER as CHECKPOINTS
from msf_faiss.checkpoint.format import MANIFEST, find_checkpoint
from msf_faiss.config.load import load_config
from msf_faiss.errors import UserError
from msf_faiss.evaluate.comparison import Comparison, compare
from msf_faiss.evaluate.results import FOLDER as RESULTS
from msf_faiss.evaluate.results import Result, load_results
from msf_faiss.files import kind_of
from msf_faiss.neighbors.inspection import inspect
from msf_faiss.neighbors.options import InspectOptions
from msf_faiss.neighbors.records import Inspection
from msf_faiss.report.metrics import Metrics, read_metrics
from msf_faiss.run.directory import CONFIG
from msf_faiss.run.metrics_file import METRICS
from msf_faiss.run.status import STATUS, Status, read_status

_QUERIES, _NEIGHBORS = 6, 8
_PAGES_FOLDER, _PAGE_SUFFIXES = "neighbors", {".html", ".png"}

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The contents of a run directory."""

    path: Path
    name: str  # short, unique among the runs of the report
    metrics: Metrics
    status: Status | None
    config: Mapping[str, Any] | None  # as JSON values
    results: Sequence[Result]
    comparisons: Sequence[Comparison]
    inspection: Inspection | None
    pages: Sequence[Path]  # written by inspect-neighbors
    provenance: Mapping[str, str]  # hardware, software and times
    missing: Mapping[str, str]  # why "config", "status", "results" or "neighbors" is missing


def read_runs(paths: Sequence[Path], *, neighbors: bool) -> list[RunRecord]:
    """Read each of the runs once.

    Args:
        paths: run directories, in training or not.
        neighbors: retrieve the neighbours of a few queries from the newest checkpoint's bank.

    Raises:
        UserError: if one of the paths is not a run, or its metrics cannot be read or have another format version.
    """
    unique = list({os.path.realpath(path): path for path in reversed(paths)}.values())[::-1]
    for path in unique:
        if kind_of(path) != "folder":
            raise UserError(f"{path}: no such run directory; name the directory given to `pretrain --out`")
        if not any((path / name).exists() for name in (CONFIG, METRICS, STATUS)):
            raise UserError(f"{path}: not a run (no {CONFIG} in it); name the directory given to `pretrain --out`")
    return [_read(path, name, neighbors=neighbors) for path, name in zip(unique, short_names(unique), strict=True)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest trailing parts of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(path: Path, name: str, *, neighbors: bool) -> RunRecord:
    missing: dict[str, str] = {}

    def attempt(part: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except UserError as error:
            missing[part] = str(error)
            return None

    try:
        metrics = read_metrics(path / METRICS)
    except OSError as error:
        raise UserError(f"{path / METRICS}: cannot be read: {error.strerror}") from error
    status = attempt("status", lambda: read_status(path))
    config = attempt("config", lambda: load_config(path / CONFIG).model_dump(mode="json"))
    results = attempt("results", lambda: load_results(path / RESULTS)) or []
    inspection = None
    if neighbors:  # on the CPU, since a run that still trains may have left no GPU memory
        inspection = attempt(
            "neighbors", lambda: inspect(find_checkpoint(path), InspectOptions(queries=_QUERIES, k=_NEIGHBORS))
        )
    return RunRecord(
        path=path,
        name=name,
        metrics=metrics,
        status=status,
        config=config,
        results=results,
        comparisons=compare(results),
        inspection=inspection,
        pages=sorted(page for page in (path / _PAGES_FOLDER).glob("*") if page.suffix in _PAGE_SUFFIXES),
        provenance=_provenance(path, status, results),
        missing=missing,
    )


def _provenance(path: Path, status: Status | None, results: Sequence[Result]) -> dict[str, str]:
    facts: dict[str, str] = {}
    if status is not None and status.heartbeat is not None:
        beat = status.heartbeat
        facts["host"] = beat.host
        facts["last process started"] = format_time(beat.started)
        facts["last heartbeat"] = format_time(beat.time)
    if results:
        facts["evaluated on"] = ", ".join(dict.fromkeys(result.device for result in results))
        facts["evaluated with"] = _versions(results[-1].versions)
    manifest = _newest_manifest(path)
    if manifest:
        facts["newest checkpoint"] = f"step {manifest.get('step')}, {manifest.get('created')}"
        if isinstance(manifest.get("versions"), dict):
            facts["trained with"] = _versions(manifest["versions"])
        if manifest.get("origin"):
            facts["started from"] = str(manifest["origin"])
    return facts


def _newest_manifest(path: Path) -> dict[str, Any]:
    """Return the newest readable manifest, unchecked, or an empty one."""
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


def format_time(seconds: float) -> str:
    """Format Unix time as UTC."""
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"
