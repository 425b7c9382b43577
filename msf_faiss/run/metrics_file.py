"""RUN/metrics.jsonl: a header with the version of the format, then one JSON object per event. Needs no torch."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msf_faiss.errors import UserError
from msf_faiss.files import write_atomic
from msf_faiss.run.events import BankAdjusted, CollapseDetected, Event, KnnEvaluated, RunStarted, TrainingProgress

METRICS = "metrics.jsonl"
VERSION = 2
_FORMAT = "msf-faiss metrics"
HEADER = json.dumps({"format": _FORMAT, "version": VERSION}) + "\n"


class MetricsWriter:
    """Appends a line per event; call it with each event, in order.

    Every line has step, epoch and the latest loss, which is null at step 0.

    A resumed run first drops the lines after its checkpoint, so that no step occurs twice.

    Raises:
        UserError: if the file of the run to resume has another format version.
        OSError: if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loss: float | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                write_atomic(self._path, HEADER + "".join(self._lines_until(event.first_step)))
            case TrainingProgress():
                self._loss = event.loss
                self._append(event.metrics())
            case KnnEvaluated():
                knn = {f"knn_{name}": value for name, value in asdict(event).items() if name not in {"step", "epoch"}}
                self._append(self._place(event) | knn)
            case CollapseDetected():
                self._append(self._place(event) | {"collapse": asdict(event)})
            case BankAdjusted():
                self._append(self._place(event) | {"bank_adjusted": event.text})
            case _:
                pass

    def _place(self, event: KnnEvaluated | CollapseDetected | BankAdjusted) -> dict[str, Any]:
        return {"step": event.step, "epoch": event.epoch, "loss": self._loss}

    def _append(self, values: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def _lines_until(self, step: int) -> list[str]:
        """The complete lines up to `step`."""
        if step == 0 or not self._path.exists():
            return []
        header, *lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) or [HEADER]
        check_header(self._path, header)
        kept = []
        for line in lines:
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:  # truncated when the process was killed
                continue
        return kept


def check_header(path: Path, line: str | bytes) -> None:
    """Raise a UserError unless `line`, the first of the file at `path`, is the header of this format version."""
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    version = header.get("version") if isinstance(header, dict) and header.get("format") == _FORMAT else 1
    if version != VERSION:
        raise UserError(
            f"{path}: metrics of format version {version}, but this msf-faiss reads version {VERSION} only. Use the "
            "msf-faiss that wrote the file, or train again with another --out"
        )
