"""Tables of settings and of evaluation results, side by side for all runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msf_faiss.evaluate.comparison import TITLES, Comparison, describe_data
from msf_faiss.report.run_record import RunRecord

Rows = dict[str, list[str | None]]
"""By setting: its value in each run with a readable config, or None if the run has no such setting."""


def config_sections(runs: Sequence[RunRecord]) -> dict[str, Rows]:
    """Return all settings by section; the section "" holds top-level settings."""
    configs = [_flatten(run.config) for run in runs if run.config is not None]
    sections: dict[str, Rows] = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        section, dot, rest = key.partition(".")
        section, rest = (section, rest) if dot else ("", key)
        sections.setdefault(section, {})[rest] = [config.get(key) for config in configs]
    return sections


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return every setting by its dotted key, as a config file spells it."""
    flat: dict[str, str] = {}
    for key, value in sorted(config.items(), key=lambda item: item[0] != "kind"):
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def differences(sections: Mapping[str, Rows]) -> Rows:
    """Return the settings that differ between runs, by dotted key."""
    return {
        f"{section}.{key}".removeprefix("."): values
        for section, rows in sections.items()
        for key, values in rows.items()
        if differ(values)
    }


def differ(values: Sequence[str | None]) -> bool:
    """Return whether the runs have different values."""
    return len(set(values)) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScoreTable:
    """Comparisons on the same images: one row for each metric, one group of columns for each run and step."""

    data: str  # describes the images
    groups: list[tuple[int, Comparison]]  # with the number of the run
    heads: list[list[str]]  # by group: column titles
    rows: dict[str, list[list[str]]]  # by metric and group: cells
    best: dict[str, str]  # by metric: the cell with the highest accuracy


def score_tables(runs: Sequence[RunRecord]) -> list[_ScoreTable]:
    """Return one table for each set of evaluated images, with all runs that were evaluated on it."""
    by_images: dict[str, list[tuple[int, Comparison]]] = {}
    for number, run in enumerate(runs):
        for comparison in run.comparisons:
            by_images.setdefault(describe_data(comparison.data), []).append((number, comparison))
    return [_score_table(data, groups) for data, groups in by_images.items()]


def _score_table(data: str, groups: list[tuple[int, Comparison]]) -> _ScoreTable:
    heads = []
    for _, comparison in groups:
        gains = any(comparison.gain(metric) is not None for metric in comparison.scores)
        heads.append([*(TITLES[name] for name in comparison.encoders), *(["gain"] if gains else [])])
    rows: dict[str, list[list[str]]] = {}
    best: dict[str, str] = {}
    for metric in dict.fromkeys(metric for _, comparison in groups for metric in comparison.scores):
        rows[metric] = []
        accuracies: list[float] = []
        for (_, comparison), head in zip(groups, heads, strict=True):
            scores = comparison.scores.get(metric, {})
            accuracies += [score.accuracy for score in scores.values()]
            cells = [_accuracy(scores[name].accuracy) if name in scores else "–" for name in comparison.encoders]
            if len(cells) < len(head):
                gain = comparison.gain(metric) if scores else None
                cells.append("–" if gain is None else f"{gain:+.1f}")
            rows[metric].append(cells)
        best[metric] = _accuracy(max(accuracies))
    return _ScoreTable(data=data, groups=groups, heads=heads, rows=rows, best=best)


def _accuracy(value: float) -> str:
    return f"{100 * value:.1f}"
