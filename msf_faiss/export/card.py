"""The model card of an export: what the encoder is, how it was trained, what the evaluations found, how to load it."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined

from msf_faiss.evaluate.comparison import Comparison, compare, describe_data
from msf_faiss.evaluate.results import EncoderName, Result, Score
from msf_faiss.export.encoder import ExportedEncoder, Format
from msf_faiss.text import printable, replace_unprintable

_LIBRARY: Mapping[Format, str] = {
    "torchvision": "torchvision",
    "timm": "timm",
    "safetensors": "pytorch",
    "onnx": "onnx",
}
_COLUMNS: Mapping[EncoderName, str] = {
    "online": "this encoder",
    "target": "this encoder",
    "untrained": "untrained",
    "pixels": "raw pixels",
}
_TOLD_ELSEWHERE = ("data", "model", "dimensions")  # parts of a protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The scores on one set of images."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...], int], ...]  # metric, an accuracy a column, number of the protocol
    protocols: tuple[tuple[str, str], ...]  # name of the evaluation, and its settings in words


def render_card(encoder: ExportedEncoder, format: Format, facts: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The card as Markdown, with front matter as the Hugging Face hub reads it. The licence is left to its owner.

    Args:
        encoder: what was exported.
        format: of the weights.
        facts: as in the export's JSON, files and versions among them.
        results: what the evaluations found for these weights, and for untrained ones.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"plain": plain, "count": "{:,.0f}".format, "short": "{:.4g}".format}
    template = importlib.resources.files("msf_faiss.export").joinpath("card.md.j2").read_text("utf-8")
    return environment.from_string(template).render(
        encoder=encoder,
        format=format,
        library=_LIBRARY[format],
        facts=facts,
        config=facts["training"]["config"],
        backbone=encoder.backbone,
        views=encoder.views,
        tables=[_table(comparison, results) for comparison in compare(results) if _judges(comparison)],
    )


def plain(text: object) -> str:
    """Text that Markdown and HTML take literally, on one line."""
    shown = replace_unprintable(printable(str(text)))
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", shown)


def words(value: Any) -> str:
    """A JSON value of a protocol in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(name).replace('_', ' ')} {words(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _judges(comparison: Comparison) -> bool:
    """Whether it has a score of the exported encoder, not of others alone."""
    return comparison.step is not None


def _table(comparison: Comparison, results: Sequence[Result]) -> Table:
    """The rows that have a score of the exported encoder, with others' by the same protocol."""
    protocols: dict[tuple[str, str], int] = {}
    rows = []
    for metric, scores in comparison.scores.items():
        found = {name: _result_of(score, results) for name, score in scores.items()}
        own = next((name for name in found if name in ("online", "target")), None)
        if own is None:
            continue
        asked = _question(found[own])
        cells = tuple(
            f"{100 * scores[name].accuracy:.1f}" if name in found and _question(found[name]) == asked else "–"
            for name in comparison.encoders
        )
        told = {name: value for name, value in found[own].protocol.items() if name not in _TOLD_ELSEWHERE}
        number = protocols.setdefault((found[own].evaluation, words_of(told)), len(protocols) + 1)
        rows.append((metric, cells, number))
    return Table(
        heading=describe_data(comparison.data),
        columns=tuple(_COLUMNS[name] for name in comparison.encoders),
        rows=tuple(rows),
        protocols=tuple(protocols),
    )


def _question(result: Result) -> dict[str, Any]:
    """A protocol without what it says of the encoder."""
    return {name: value for name, value in result.protocol.items() if name not in ("encoder", "model", "dimensions")}


def _result_of(score: Score, results: Sequence[Result]) -> Result:
    return next(result for result in results if any(each is score for each in result.scores))


def words_of(protocol: Mapping[str, Any]) -> str:
    """All settings of a protocol, in words."""
    return "; ".join(f"{name.replace('_', ' ')}: {words(value)}" for name, value in protocol.items())
