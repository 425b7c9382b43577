"""The model card of an export: description, code that loads it, training, evaluation results."""

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined

from msf_faiss.embeddings.encoder import TrainedEncoder
from msf_faiss.evaluate.comparison import Comparison, compare, describe_data
from msf_faiss.evaluate.results import EvalEncoder, Result, Score
from msf_faiss.export.formats import Format, describe_backbone
from msf_faiss.text import printable, replace_unprintable

_LIBRARY: Mapping[Format, str] = {
    "torchvision": "torchvision",
    "timm": "timm",
    "safetensors": "pytorch",
    "onnx": "onnx",
}
_COLUMNS: Mapping[EvalEncoder, str] = {
    "online": "this encoder",
    "target": "this encoder",
    "untrained": "untrained",
    "pixels": "raw pixels",
}
_SHOWN_ELSEWHERE = ("data", "model", "dimensions")  # keys of a protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The scores on one set of images."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...], int], ...]  # metric, accuracy by column, number of the protocol
    protocols: tuple[tuple[str, str], ...]  # name of the evaluation, settings as text


def render_card(encoder: TrainedEncoder, format: Format, facts: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The card as Markdown, with the front matter of the Hugging Face hub. The licence is left to the owner.

    Args:
        encoder: the exported encoder.
        format: of the weights.
        facts: the content of msf-faiss.json.
        results: of the evaluations of these weights and of baselines.
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
        backbone=encoder.checkpoint.config.model.backbone,
        title=describe_backbone(encoder),
        tables=[_table(each, results) for each in compare(results) if each.step is not None],  # None: baselines only
    )


def plain(text: object) -> str:
    """Text on one line, escaped for Markdown and HTML."""
    shown = replace_unprintable(printable(str(text)))
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", shown)


def _table(comparison: Comparison, results: Sequence[Result]) -> Table:
    """Scores of the exported encoder, next to those of baselines by the same protocol."""
    protocols: dict[tuple[str, str], int] = {}
    rows = []
    for metric, scores in comparison.scores.items():
        found = {name: _result_of(score, results) for name, score in scores.items()}
        own = next((name for name in found if name in ("online", "target")), None)
        if own is None:
            continue
        protocol = _comparable(found[own])
        cells = tuple(
            f"{100 * scores[name].accuracy:.1f}" if name in found and _comparable(found[name]) == protocol else "–"
            for name in comparison.encoders
        )
        shown = {name: value for name, value in found[own].protocol.items() if name not in _SHOWN_ELSEWHERE}
        number = protocols.setdefault((found[own].evaluation, _settings(shown)), len(protocols) + 1)
        rows.append((metric, cells, number))
    return Table(
        heading=describe_data(comparison.data),
        columns=tuple(_COLUMNS[name] for name in comparison.encoders),
        rows=tuple(rows),
        protocols=tuple(protocols),
    )


def _comparable(result: Result) -> dict[str, Any]:
    """The part of a protocol that must agree for two scores to be compared."""
    return {name: value for name, value in result.protocol.items() if name not in ("encoder", "model", "dimensions")}


def _result_of(score: Score, results: Sequence[Result]) -> Result:
    return next(result for result in results if any(each is score for each in result.scores))


def _settings(protocol: Mapping[str, Any]) -> str:
    """The settings of a protocol as text."""
    return "; ".join(f"{name.replace('_', ' ')}: {_as_text(value)}" for name, value in protocol.items())


def _as_text(value: Any) -> str:
    """A JSON value of a protocol as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(name).replace('_', ' ')} {_as_text(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
