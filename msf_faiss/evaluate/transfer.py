"""Score one encoder by logistic regression on its features: transfer evaluation."""

import time
from collections.abc import Sequence

from msf_faiss.evaluate import logistic
from msf_faiss.evaluate.features import choose_images, compute_features
from msf_faiss.evaluate.logistic import LogisticScore, Metric, train_logistic
from msf_faiss.evaluate.protocol import common_protocol, make_result
from msf_faiss.evaluate.results import EvalEncoder, Result, Score
from msf_faiss.evaluate.setup import EvalSetup


def score_transfer(
    setup: EvalSetup,
    encoder: EvalEncoder,
    *,
    metric: Metric = "accuracy",
    penalties: Sequence[float] = logistic.GRID,
) -> Result:
    """Accuracy of logistic regression (see `logistic.train_logistic`).

    Args:
        setup: weights and images.
        encoder: name of the encoder.
        metric: selects the penalty; both metrics are reported, this one first.
        penalties: to choose from.

    Raises:
        UserError: if there are no held-out images, images have no labels, fewer than two classes or are unreadable, or
            weights or features are invalid.
    """
    start = time.perf_counter()
    with setup.ranks.report_on_main():
        setup.held_out("logistic regression")
        chosen = choose_images(setup)
    features = compute_features(setup, encoder, chosen)
    setup.notify(
        f"{encoder}: logistic regression on {len(features['train'].ids):,} images with {len(penalties)} penalties"
    )
    score = setup.ranks.on_main(
        lambda: train_logistic(
            features["train"],
            features["test"],
            seed=setup.config.seed,
            penalties=penalties,
            metric=metric,
            on_fit=setup.on_progress,
        )
    )
    if score.at_edge:
        setup.notify(
            f"{encoder}: the best penalty, {score.penalty:g}, is the first or last of the grid; a better one may lie "
            "outside"
        )
    if score.unconverged:
        setup.notify(f"{encoder}: {score.unconverged} of {len(penalties) + 1} fits did not converge")
    protocol = {
        **common_protocol(setup, encoder, chosen, features),
        "features": "L2-normalised, then standardised by the mean and variance of the fitted images",
        "classifier": {
            "name": "multinomial logistic regression, scikit-learn",
            "solver": "L-BFGS",
            "tolerance": logistic.TOLERANCE,
            "max_iterations": logistic.MAX_ITERATIONS,
        },
        "penalty": {
            "objective": "mean loss + lambda/2 · |weights|²; scikit-learn's C = 1 / (lambda · fitted images)",
            "grid": sorted(set(penalties)),
            "chosen_by": f"{metric} on a part of each class's training images",
            "validation_share": logistic.VALIDATION_SHARE,
        },
        "reported": "refitted on all training images with the chosen penalty, tested once",
    }
    return make_result(setup, encoder, "transfer", _scores(score), protocol, start)


def _scores(score: LogisticScore) -> list[Score]:
    settings = {"penalty": score.penalty, "c": score.c, "unconverged": score.unconverged}
    scores = [
        Score(
            metric="logistic",
            accuracy=score.accuracy,
            correct=score.correct,
            images=score.images,
            settings={"mean": "images", **settings},
        ),
        Score(
            metric="logistic, mean per class",
            accuracy=score.mean_per_class,
            correct=None,
            images=score.images,
            settings={"mean": "classes", **settings},
        ),
    ]
    return scores if score.metric == "accuracy" else scores[::-1]
