"""RUN/metrics.jsonl: a header with the format's version, then one JSON object per progress event. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msf_faiss.errors import UserError
from msf_faiss.files import write_atomic

METRICS = "metrics.jsonl"
VERSION = 2
_FORMAT = "msf-faiss metrics"
HEADER = json.dumps({"format": _FORMAT, "version": VERSION}) + "\n"


def check_header(path: Path, line: str | bytes) -> None:
    """Refuse metrics of another format version.

    Args:
        path: of the file, for the message.
        line: its first line.

    Raises:
        UserError: if `line` is not the header of this version.
    """
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    is_header = isinstance(header, dict) and header.get("format") == _FORMAT
    version = header.get("version") if is_header else 1
    if version != VERSION:
        raise UserError(
            f"{path}: metrics of format version {version}, but this msf-faiss reads version {VERSION} only; use the "
            "msf-faiss that wrote the file, or train again with another --out"
        )


def begin_metrics(path: Path, step: int) -> None:
    """Create the file, or drop all lines after `step`, the step of the checkpoint that the run resumes from.

    Raises:
        UserError: if the file has another format version.
        OSError: if it cannot be read or written.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if step and path.exists() else []
    kept = [HEADER]
    if lines:
        check_header(path, lines[0])
    for line in lines[1:]:
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:  # cut short by a kill
            continue
    write_atomic(path, "".join(kept))


def append_metrics(path: Path, values: dict[str, Any]) -> None:
    """Append one line.

    Raises:
        OSError: if it cannot be written.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
