"""The transfer evaluation of one encoder: from images to a `Result`. The method is `logistic`'s."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from msf_faiss.evaluate import logistic
from msf_faiss.evaluate.logistic import Fit, LogisticScore, Metric, train_logistic
from msf_faiss.evaluate.protocol import Notify, choose, compute_features, protocol_of, result_of
from msf_faiss.evaluate.results import EncoderName, Result, Score
from msf_faiss.evaluate.setup import EvalSetup


def score_transfer(
    setup: EvalSetup,
    encoder: EncoderName,
    *,
    metric: Metric = "accuracy",
    strengths: Sequence[float] = logistic.GRID,
    validation_share: float = logistic.VALIDATION_SHARE,
    batch_size: int = 256,
    on_fit: Callable[[Fit], None] = lambda done: None,
    notify: Notify = lambda line: None,
) -> Result:
    """Accuracy of a logistic regression on one encoder's features (see `logistic.train_logistic`).

    Args:
        setup: weights and images, held-out ones among them.
        encoder: which features.
        metric: by which the regularisation is chosen; both are reported, this one first.
        strengths: penalties to choose from.
        validation_share: of the training images, to choose by.
        batch_size: images embedded at a time.
        on_fit: told after each penalty.
        notify: told what happens next.

    Raises:
        UserError: if there are no held-out images, images have no labels or cannot be read, they are of fewer than two
            classes, or weights or features cannot be used.
    """
    began = time.perf_counter()
    with setup.ranks.report_on_main():
        setup.held_out("logistic regression")
        chosen = choose(setup)
    features = compute_features(setup, encoder, chosen, batch_size=batch_size, notify=notify)
    notify(f"{encoder}: logistic regression on {len(features['train'].ids):,} images, {len(strengths)} penalties")
    score = setup.ranks.on_main(
        lambda: train_logistic(
            features["train"],
            features["test"],
            seed=setup.config.seed,
            strengths=strengths,
            validation_share=validation_share,
            metric=metric,
            on_fit=on_fit,
        )
    )
    if score.at_edge:
        notify(
            f"{encoder}: the best penalty, {score.strength:g}, is at an end of the grid; a better one may lie beyond"
        )
    if score.unconverged:
        notify(f"{encoder}: {score.unconverged} of {len(strengths) + 1} fits ended before they converged")
    protocol = {
        **protocol_of(setup, encoder, chosen, features),
        "features": "L2-normalised, then standardised by mean and variance of the fitted images",
        "classifier": {
            "name": "multinomial logistic regression, scikit-learn",
            "solver": "L-BFGS",
            "tolerance": logistic.TOLERANCE,
            "max_iterations": logistic.MAX_ITERATIONS,
        },
        "penalty": {
            "of": "lambda of mean loss + lambda/2 · |weights|²; scikit-learn's C = 1 / (lambda · images fitted)",
            "grid": sorted(set(strengths)),
            "chosen_by": f"{metric} on a part of each class's training images",
            "validation_share": validation_share,
        },
        "reported": "fitted anew on all training images with the chosen penalty, then tested once",
    }
    return result_of(setup, encoder, "transfer", _scores(score), protocol, began)


def _scores(score: LogisticScore) -> list[Score]:
    found = {"penalty": score.strength, "c": score.c, "unconverged": score.unconverged}
    both = {
        "accuracy": Score(
            metric="logistic",
            accuracy=score.accuracy,
            correct=score.correct,
            images=score.images,
            settings={"mean": "images", **found},
        ),
        "mean-per-class": Score(
            metric="logistic, mean per class",
            accuracy=score.mean_per_class,
            correct=None,
            images=score.images,
            settings={"mean": "classes", **found},
        ),
    }
    first = both.pop(score.metric)
    return [first, *both.values()]
