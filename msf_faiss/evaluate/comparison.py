"""Compare results on the same images: one row per metric, one column per encoder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from msf_faiss.evaluate.results import EvalEncoder, EvaluationName, Result, Score

TITLES: Mapping[EvalEncoder, str] = {
    "online": "trained",
    "target": "target encoder",
    "weights": "weights",
    "untrained": "untrained",
    "pixels": "raw pixels",
}
"""Column titles."""

_ORDER: tuple[EvalEncoder, ...] = get_args(EvalEncoder)
_TRAINED: tuple[EvalEncoder, ...] = ("online", "target", "weights")
_EVALUATIONS: tuple[EvaluationName, ...] = get_args(EvaluationName)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All scores on one set of images: of one checkpoint, and of its untrained network and raw pixels."""

    step: int | None  # None: unknown, or only untrained encoders were scored
    epoch: float | None
    checkpoint: str | None  # or file of weights; None: only untrained encoders were scored
    data: Mapping[str, Any]  # the "data" of the results' protocol
    encoders: tuple[EvalEncoder, ...]  # with a score, in the order of columns
    scores: Mapping[str, Mapping[EvalEncoder, Score]]  # by metric, in the order of rows
    results: tuple[Result, ...]  # with these scores, by evaluation

    def gain(self, metric: str) -> float | None:
        """Trained minus untrained accuracy, in percentage points; None if one of them is missing."""
        scores = self.scores[metric]
        trained = next((scores[name] for name in _TRAINED if name in scores), None)
        if trained is None or "untrained" not in scores:
            return None
        return 100 * (trained.accuracy - scores["untrained"].accuracy)


def compare(results: Sequence[Result]) -> list[Comparison]:
    """Group results into comparisons, by data (in the order of first results), then by step.

    If several results have a score of the same metric and encoder, the last one counts.
    """
    by_images: dict[str, list[Result]] = {}
    for result in results:
        key = json.dumps([result.protocol["data"], result.protocol["view"]], sort_keys=True)
        by_images.setdefault(key, []).append(result)
    comparisons = []
    for group in by_images.values():
        weights = {result.weights: result for result in group if result.weights is not None}
        for trained in sorted(weights.values(), key=lambda result: result.step or 0) or (None,):
            comparable = [result for result in group if trained is None or _is_comparable(result, trained)]
            comparisons.append(_compare(trained, comparable))
    return comparisons


def describe_data(data: Mapping[str, Any]) -> str:
    """The images of a protocol's "data", in one line: where, how many, and the accuracy of guessing.

    "Chance" guesses each class equally often; "the majority class" is a guess that never changes.
    """
    config = data["config"]
    held_out = data["held_out_images"]
    where = config.get("test_path") if held_out is not None else config.get("path")
    if "test_split" in config:
        where = f"{config['path']}, {config['split'] if held_out is None else config['test_split']}"
    images = (
        f"{data['training_images']:,} training images, leave-one-out"
        if held_out is None
        else f"{held_out:,} held-out images, {data['training_images']:,} training images"
    )
    return (
        f"{where or config['kind']}: {images}; {data['classes']} classes, chance {1 / data['classes']:.1%}, majority "
        f"class {data['commonest_class']:.1%}"
    )


def describe_exceptions(results: Sequence[Result]) -> list[str]:
    """Lines on what is not as the names of the metrics or the numbers of images say."""
    lines = [
        f"k = {k} is larger than the number of voters: all {count:,} vote"
        for result in results
        for k, count in result.protocol.get("clamped_k", {}).items()
    ]
    lines += [
        f"{score.metric}, {TITLES[result.encoder]}: not converged, the training loss was still falling"
        for result in results
        for score in result.scores[:1]
        if score.settings.get("converged") is False
    ]
    for data in (result.protocol["data"] for result in results):
        left_out = data.get("left_out", {})
        unlabelled = left_out.get("test", {}).get("unlabelled")
        if data["held_out_images"] is None and unlabelled:
            lines.append(f"leave-one-out, because none of the {unlabelled:,} held-out images has a label")
        if data.get("unknown_class"):
            lines.append(
                f"held-out images of classes without training images, which count as wrong: {data['unknown_class']:,}"
            )
        lines += [
            f"skipped {count:,} {why} {'training' if split == 'train' else 'held-out'} images"
            for split, reasons in left_out.items()
            for why, count in reasons.items()
            if count
        ]
    return list(dict.fromkeys(lines))


def _is_comparable(result: Result, trained: Result) -> bool:
    """Whether a result is of the same weights as `trained`, of the same network untrained, or of pixels."""
    if result.weights is not None:
        return result.weights == trained.weights
    return result.protocol.get("model") in (None, trained.protocol.get("model"))


def _compare(trained: Result | None, results: Sequence[Result]) -> Comparison:
    scores: dict[str, dict[EvalEncoder, Score]] = {}
    evaluations: dict[str, EvaluationName] = {}
    latest: dict[tuple[str, EvalEncoder], Result] = {}
    for result in results:
        for score in result.scores:
            scores.setdefault(score.metric, {})[result.encoder] = score
            evaluations[score.metric] = result.evaluation
            latest[score.metric, result.encoder] = result
    counted = {id(result): result for result in latest.values()}
    present = {encoder for by_encoder in scores.values() for encoder in by_encoder}
    return Comparison(
        step=None if trained is None else trained.step,
        epoch=None if trained is None else trained.epoch,
        checkpoint=None if trained is None else trained.checkpoint,
        data=results[0].protocol["data"],
        encoders=tuple(encoder for encoder in _ORDER if encoder in present),
        scores={
            metric: scores[metric]
            for metric in sorted(scores, key=lambda metric: _sort_key(scores[metric], metric, evaluations[metric]))
        },
        results=tuple(
            sorted(
                counted.values(),
                key=lambda result: (_EVALUATIONS.index(result.evaluation), _ORDER.index(result.encoder)),
            )
        ),
    )


def _sort_key(scores: Mapping[EvalEncoder, Score], metric: str, evaluation: EvaluationName) -> tuple[Any, ...]:
    """Order of rows: by evaluation; kNN by k, then majority vote, then by temperature; others by name, top 1 first."""
    settings = next(iter(scores.values())).settings
    name = metric.removesuffix(", top 5").removesuffix(", mean per class")
    return (
        _EVALUATIONS.index(evaluation),
        settings.get("k") or 0,
        settings.get("temperature") or 0,
        settings.get("labels") or 0,
        name,
        settings.get("mean") == "classes",
        settings.get("top") or 0,
    )
