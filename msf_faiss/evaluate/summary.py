"""All results of a folder on one page, for people (Markdown) and for programs (JSON)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import msf_faiss
from msf_faiss.errors import UserError
from msf_faiss.evaluate.comparison import TITLES, Comparison, compare, describe_data
from msf_faiss.evaluate.results import SUMMARY, Result, load_results
from msf_faiss.files import write_atomic

PAGE = "summary.md"
FORMAT = "msf-faiss summary"


def write_summary(folder: Path, title: str) -> Path:
    """Write `summary.md` and `summary.json` beside the results in `folder`; older ones give way. Returns the former.

    Raises:
        UserError: if a file there is no result, or the page cannot be written.
    """
    results = load_results(folder)
    page = folder / PAGE
    try:
        write_atomic(folder / SUMMARY, json.dumps(summary_json(results, title), indent=2) + "\n")
        write_atomic(page, summary_markdown(results, title))
    except OSError as error:
        raise UserError(f"{page}: cannot be written: {error.strerror}; name another folder with --out") from error
    return page


def summary_json(results: Sequence[Result], title: str) -> dict[str, Any]:
    """The comparisons, numbers alone, and then every result with its protocol."""
    return {
        "format": FORMAT,
        "title": title,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": msf_faiss.__version__,
        "comparisons": [
            {
                "checkpoint": comparison.checkpoint,
                "step": comparison.step,
                "epoch": comparison.epoch,
                "data": comparison.data,
                "accuracies": {
                    metric: {encoder: score.accuracy for encoder, score in scores.items()}
                    for metric, scores in comparison.scores.items()
                },
            }
            for comparison in compare(results)
        ],
        "results": [result.to_json() for result in results],
    }


def summary_markdown(results: Sequence[Result], title: str) -> str:
    """A table for each comparison, and below it the complete protocol of every number in it."""
    parts = [f"# Results of {_plain(title)}\n"]
    for comparison in compare(results):
        parts += _section(comparison)
    parts.append(f"Made by msf-faiss {msf_faiss.__version__}.\n")
    return "\n".join(parts)


def _section(comparison: Comparison) -> list[str]:
    what = comparison.checkpoint or "Without training"
    when = "" if comparison.epoch is None else f" (epoch {comparison.epoch:.4g})"
    lines = [f"## {_plain(what)}{when}\n", f"Accuracy in %. {_plain(describe_data(comparison.data))}.\n"]
    gains = {metric: comparison.gain(metric) for metric in comparison.scores}
    columns = [TITLES[encoder] for encoder in comparison.encoders]
    if any(gain is not None for gain in gains.values()):
        columns.append("gain")
    protocols: list[tuple[str, str]] = []  # text and whose it is, in the order of the numbers that name them
    marks = {id(result): _mark(result, protocols) for result in comparison.results}
    answer = {(score.metric, result.encoder): result for result in comparison.results for score in result.scores}
    lines.append(f"| | {' | '.join(columns)} |")
    lines.append(f"|---|{'---:|' * len(columns)}")
    for metric, scores in comparison.scores.items():
        cells = [
            f"{100 * scores[encoder].accuracy:.2f} [{marks[id(answer[metric, encoder])]}]" if encoder in scores else "–"
            for encoder in comparison.encoders
        ]
        gain = gains[metric]
        if "gain" in columns:
            cells.append("" if gain is None else f"{gain:+.2f}")
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    lines.append("\ngain: trained minus untrained, in percentage points. [n]: the protocol of the number.\n")
    for number, (text, whose) in enumerate(protocols, start=1):
        lines.append(f"<details><summary>[{number}] {whose}</summary>\n\n```yaml\n{text}```\n\n</details>\n")
    return lines


def _mark(result: Result, protocols: list[tuple[str, str]]) -> int:
    """The number of the result's protocol, which is added if it is new."""
    text = yaml.safe_dump(json.loads(json.dumps(result.protocol)), sort_keys=False, allow_unicode=True, width=110)
    entry = (text, f"{result.evaluation}, {TITLES[result.encoder]}")
    known = [each for each, _ in protocols]
    if text in known:
        return known.index(text) + 1
    protocols.append(entry)
    return len(protocols)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|~" else letter for letter in " ".join(text.split()))
