"""Results side by side: the same images and the same question, one column an encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from msf_faiss.evaluate.results import EncoderName, EvaluationName, Result, Score

TITLES: Mapping[EncoderName, str] = {
    "online": "trained",
    "target": "target encoder",
    "weights": "weights",
    "untrained": "untrained",
    "pixels": "raw pixels",
}
"""What a table calls the encoders."""

_ORDER: tuple[EncoderName, ...] = get_args(EncoderName)
_TRAINED: tuple[EncoderName, ...] = ("online", "target", "weights")
_EVALUATIONS: tuple[EvaluationName, ...] = get_args(EvaluationName)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All scores on one set of images, of the weights of one step and of those that training never touched."""

    step: int | None  # None: not known, or only untrained encoders were scored
    epoch: float | None
    checkpoint: str | None  # or file of weights; None: only untrained encoders were scored
    data: Mapping[str, Any]  # the "data" of the results' protocol
    encoders: tuple[EncoderName, ...]  # those with a score, in reading order
    scores: Mapping[str, Mapping[EncoderName, Score]]  # by metric, in reading order
    results: tuple[Result, ...]  # that the scores are of, by evaluation

    def gain(self, metric: str) -> float | None:
        """Trained minus untrained accuracy, in percentage points; None where one of them is missing."""
        found = self.scores[metric]
        trained = next((found[name] for name in _TRAINED if name in found), None)
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
        weights = {result.weights: result for result in group if result.weights is not None}
        for one in sorted(weights.values(), key=lambda result: result.step or 0) or (None,):
            fitting = [result for result in group if one is None or _belongs(result, one)]
            comparisons.append(_compare(one, fitting))
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


def _belongs(result: Result, one: Result) -> bool:
    """Whether a result stands beside those of `one`'s weights: of the same, of the same net untrained, or of no net."""
    if result.weights is not None:
        return result.weights == one.weights
    return result.protocol.get("model") in (None, one.protocol.get("model"))


def _compare(one: Result | None, results: Sequence[Result]) -> Comparison:
    found: dict[str, dict[EncoderName, Score]] = {}
    evaluations: dict[str, EvaluationName] = {}
    latest: dict[tuple[str, EncoderName], Result] = {}
    for result in results:
        for score in result.scores:
            found.setdefault(score.metric, {})[result.encoder] = score
            evaluations[score.metric] = result.evaluation
            latest[score.metric, result.encoder] = result
    answers = {id(result): result for result in latest.values()}
    present = {encoder for scores in found.values() for encoder in scores}
    return Comparison(
        step=None if one is None else one.step,
        epoch=None if one is None else one.epoch,
        checkpoint=None if one is None else one.checkpoint,
        data=results[0].protocol["data"],
        encoders=tuple(encoder for encoder in _ORDER if encoder in present),
        scores={
            metric: found[metric]
            for metric in sorted(found, key=lambda metric: _place(found[metric], metric, evaluations[metric]))
        },
        results=tuple(
            sorted(
                answers.values(),
                key=lambda result: (_EVALUATIONS.index(result.evaluation), _ORDER.index(result.encoder)),
            )
        ),
    )


def _place(scores: Mapping[EncoderName, Score], metric: str, evaluation: EvaluationName) -> tuple[Any, ...]:
    """By evaluation; kNN by k, majority before weighted, by temperature; others by name, then top 1 before top 5."""
    settings = next(iter(scores.values())).settings
    name = metric.removesuffix(", top 5")
    return (
        _EVALUATIONS.index(evaluation),
        settings.get("k") or 0,
        settings.get("temperature") or 0,
        settings.get("labels") or 0,
        name,
        settings.get("top") or 0,
    )
