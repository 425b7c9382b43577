"""Summarise all results of a folder, as Markdown and as JSON."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import msf_faiss
from msf_faiss.errors import UserError
from msf_faiss.evaluate.comparison import TITLES, Comparison, compare, describe_data, describe_exceptions
from msf_faiss.evaluate.results import SUMMARY, Result, load_results
from msf_faiss.files import write_atomic


def write_summary(folder: Path, title: str) -> Path:
    """Write or replace `summary.md` and `summary.json` in the results folder; returns the path of the former.

    Raises:
        UserError: if a JSON file in the folder is not a result, or the files cannot be written.
    """
    results = load_results(folder)
    page = folder / "summary.md"
    try:
        write_atomic(folder / SUMMARY, json.dumps(_summary_json(results, title), indent=2) + "\n")
        write_atomic(page, summary_markdown(results, title))
    except OSError as error:
        raise UserError(f"{page}: cannot write: {error.strerror}; name another folder with --out") from error
    return page


def _summary_json(results: Sequence[Result], title: str) -> dict[str, Any]:
    """The accuracies of all comparisons, then every result with its protocol."""
    return {
        "format": "msf-faiss summary",
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
    """A table per comparison, followed by the protocols of its numbers."""
    sections = [f"# Results of {_escape(title)}\n"]
    for comparison in compare(results):
        sections += _section(comparison)
    sections.append(f"Written by msf-faiss {msf_faiss.__version__}.\n")
    return "\n".join(sections)


def _section(comparison: Comparison) -> list[str]:
    title = comparison.checkpoint or "Untrained"
    epoch = "" if comparison.epoch is None else f" (epoch {comparison.epoch:.4g})"
    lines = [f"## {_escape(title)}{epoch}\n", f"Accuracy in %. {_escape(describe_data(comparison.data))}.\n"]
    lines += [f"- {_escape(line)}" for line in describe_exceptions(comparison.results)]
    lines.append("")
    gains = {metric: comparison.gain(metric) for metric in comparison.scores}
    columns = [TITLES[encoder] for encoder in comparison.encoders]
    if any(gain is not None for gain in gains.values()):
        columns.append("gain")
    protocols: list[tuple[str, str]] = []  # text and title; number n is at n - 1
    numbers = {id(result): _protocol_number(result, protocols) for result in comparison.results}
    by_score = {(score.metric, result.encoder): result for result in comparison.results for score in result.scores}
    lines.append(f"| | {' | '.join(columns)} |")
    lines.append(f"|---|{'---:|' * len(columns)}")
    for metric, scores in comparison.scores.items():
        cells = [
            f"{100 * scores[encoder].accuracy:.2f} [{numbers[id(by_score[metric, encoder])]}]"
            if encoder in scores
            else "–"
            for encoder in comparison.encoders
        ]
        gain = gains[metric]
        if "gain" in columns:
            cells.append("" if gain is None else f"{gain:+.2f}")
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    lines.append("\ngain: trained minus untrained, in percentage points. [n]: number of the protocol below.\n")
    for number, (text, heading) in enumerate(protocols, start=1):
        lines.append(f"<details><summary>[{number}] {heading}</summary>\n\n```yaml\n{text}```\n\n</details>\n")
    return lines


def _protocol_number(result: Result, protocols: list[tuple[str, str]]) -> int:
    """The number of the result's protocol in `protocols`, to which it is added if it is new."""
    text = yaml.safe_dump(json.loads(json.dumps(result.protocol)), sort_keys=False, allow_unicode=True, width=110)
    known = [each for each, _ in protocols]
    if text in known:
        return known.index(text) + 1
    protocols.append((text, f"{result.evaluation}, {TITLES[result.encoder]}"))
    return len(protocols)


def _escape(text: str) -> str:
    """`text` on one line, with the special characters of Markdown escaped."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|~" else letter for letter in " ".join(text.split()))
