"""What stands in tables: the settings of runs beside each other, and what the evaluations found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msf_faiss.evaluate.comparison import TITLES, Comparison, describe_data
from msf_faiss.report.record import RunRecord, settings

Rows = dict[str, list[str | None]]
"""By setting: its value in each run whose config is known; None: the run has no such setting."""


def config_sections(runs: Sequence[RunRecord]) -> dict[str, Rows]:
    """All settings by section, "" for those outside of one."""
    each = [settings(run.config) for run in runs if run.config is not None]
    sections: dict[str, Rows] = {}
    for key in dict.fromkeys(key for found in each for key in found):
        section, dot, rest = key.partition(".")
        section, rest = (section, rest) if dot else ("", key)
        sections.setdefault(section, {})[rest] = [found.get(key) for found in each]
    return sections


def differences(sections: Mapping[str, Rows]) -> Rows:
    """The settings that are not the same in all runs, by their whole key."""
    return {
        f"{section}.{key}".removeprefix("."): values
        for section, rows in sections.items()
        for key, values in rows.items()
        if differ(values)
    }


def differ(values: Sequence[str | None]) -> bool:
    """Whether the runs have not all the same value."""
    return len(set(values)) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTable:
    """Comparisons on the same images; a row a metric, a group of columns a run and step."""

    about: str
    groups: list[tuple[int, Comparison]]  # number of the run
    heads: list[list[str]]  # of each group its columns
    rows: dict[str, list[list[str]]]  # by metric: of each group its cells
    best: dict[str, str]  # the highest accuracy of a row, as its cell says it


def score_tables(runs: Sequence[RunRecord]) -> list[ScoreTable]:
    """Evaluations on the same images stand side by side, whichever run they are of."""
    by_images: dict[str, list[tuple[int, Comparison]]] = {}
    for number, run in enumerate(runs):
        for comparison in run.comparisons:
            by_images.setdefault(describe_data(comparison.data), []).append((number, comparison))
    return [_table(about, groups) for about, groups in by_images.items()]


def _table(about: str, groups: list[tuple[int, Comparison]]) -> ScoreTable:
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
    return ScoreTable(about=about, groups=groups, heads=heads, rows=rows, best=best)


def _accuracy(value: float) -> str:
    return f"{100 * value:.1f}"
