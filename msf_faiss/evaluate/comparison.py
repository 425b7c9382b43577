"""Results side by side: the same images and the same question, one column an encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msf_faiss.evaluate.results import EncoderName, Result, Score

_ORDER: tuple[EncoderName, ...] = ("online", "target", "untrained", "pixels")
_TRAINED = ("online", "target")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All scores on one set of images, of the weights of one step and of those that training never touched."""

    step: int | None  # None: only untrained encoders were scored
    epoch: float | None
    data: Mapping[str, Any]  # the "data" of the results' protocol
    encoders: tuple[EncoderName, ...]  # those with a score: online, target, untrained, pixels
    scores: Mapping[str, Mapping[EncoderName, Score]]  # by metric, in reading order

    def gain(self, metric: str) -> float | None:
        """Trained minus untrained accuracy, in percentage points; None where one of them is missing."""
        found = self.scores[metric]
        trained = found.get("online", found.get("target"))
        if trained is None or "untrained" not in found:
            return None
        return 100 * (trained.accuracy - found["untrained"].accuracy)


def compare(results: Sequence[Result]) -> list[Comparison]:
    """Comparisons, by data in the order of their first result, then by step. Of equal questions the newest answer
    counts: the last in `results`."""
    by_images: dict[str, list[Result]] = {}
    for result in results:
        key = json.dumps([result.protocol["data"], result.protocol["view"]], sort_keys=True)
        by_images.setdefault(key, []).append(result)
    comparisons = []
    for group in by_images.values():
        steps = sorted({result.step for result in group if result.encoder in _TRAINED and result.step is not None})
        for step in steps or (None,):
            fitting = [result for result in group if result.encoder not in _TRAINED or result.step == step]
            comparisons.append(_compare(step, fitting))
    return comparisons


def describe_data(data: Mapping[str, Any]) -> str:
    """The images of a protocol's "data", in a line: which, how many, and what guessing would get."""
    config = data["config"]
    held_out = data["held_out_images"]
    where = config.get("test_path") if held_out is not None else config.get("path")
    if "test_split" in config:
        where = f"{config['path']}, {config['split'] if held_out is None else config['test_split']}"
    images = (
        f"{data['training_images']:,} training images, each judged by the others"
        if held_out is None
        else f"{held_out:,} held-out images, judged by {data['training_images']:,} training images"
    )
    return (
        f"{where or config['kind']}: {images}; {data['classes']} classes, guessing gets {data['commonest_class']:.1%}"
    )


def _compare(step: int | None, results: Sequence[Result]) -> Comparison:
    found: dict[str, dict[EncoderName, Score]] = {}
    for result in results:
        for score in result.scores:
            found.setdefault(score.metric, {})[result.encoder] = score
    present = {encoder for scores in found.values() for encoder in scores}
    return Comparison(
        step=step,
        epoch=next((result.epoch for result in results if result.encoder in _TRAINED), None),
        data=results[0].protocol["data"],
        encoders=tuple(encoder for encoder in _ORDER if encoder in present),
        scores={metric: found[metric] for metric in sorted(found, key=lambda metric: _place(found, metric))},
    )


def _place(found: Mapping[str, Mapping[EncoderName, Score]], metric: str) -> tuple[bool, float, float, str, float]:
    """kNN before linear; by k, majority before weighted, by temperature; then by name."""
    settings = next(iter(found[metric].values())).settings
    name = metric.removesuffix(", top 5")
    return "k" not in settings, settings.get("k") or 0, settings.get("temperature") or 0, name, settings.get("top") or 0
