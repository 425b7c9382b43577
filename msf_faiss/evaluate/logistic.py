"""Accuracy of multinomial logistic regression on frozen features: the transfer protocol.

As SimCLR (Chen et al. 2020), BYOL (Grill et al. 2020) and MSF transfer to other data sets: the l2 penalty is chosen on
validation images from a logarithmic grid, the classifier is fitted anew on training and validation images together, and
the test images are looked at once. The arithmetic is scikit-learn's alone: a score is that of

    make_pipeline(Normalizer(), StandardScaler(), LogisticRegression(C=score.c, tol=TOLERANCE, max_iter=MAX_ITERATIONS))

fitted on the same features in float64.

Shapes: N images of a fit, M judged ones, F features, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from msf_faiss.counter_rng import hash_counters
from msf_faiss.embeddings.extract import Features
from msf_faiss.errors import UserError

Metric = Literal["accuracy", "mean-per-class"]
"""Share of the images that are right; or that share of each class, averaged over the classes (the custom where classes
differ in size: Caltech-101, Pets, Flowers, Aircraft)."""

GRID = tuple(float(strength) for strength in np.logspace(-6, 5, 45))
"""Penalties to choose from: lambda of mean loss + lambda/2 · |weights|². The papers' 45 values from 1e-6 to 1e5."""
VALIDATION_SHARE = 0.2
TOLERANCE = 1e-4
"""A fit ends where no part of the mean loss's gradient is larger (scikit-learn's default). Of penalties so weak that
the weights before them pass already, the weights are the same. On 512 correlated features 1e-5 took four times as long
and had the same best penalty and score."""
MAX_ITERATIONS = 1000
"""L-BFGS iterations of one fit; with this tolerance only the weakest penalties come near to it."""

_SPLIT = 6  # this module's stream of random numbers; others are in evaluate/inputs, evaluate/subsets, views


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One penalty, tried on the validation images."""

    strength: float  # lambda
    score: float  # 0..1 by the metric, of the validation images
    iterations: int
    converged: bool  # False: it ended at the limit of iterations, or its line search failed
    number: int  # 1, 2, ... in the order of the fits, the strongest penalty first
    fits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogisticScore:
    """The test images under the classifier that was fitted on training and validation images."""

    correct: int
    images: int
    mean_per_class: float  # 0..1, over the classes that the test images have
    classes: int  # that the test images have
    metric: Metric  # by which the penalty was chosen
    strength: float  # lambda, chosen
    c: float  # scikit-learn's C of the last fit: 1 / (lambda N)
    at_edge: bool  # an end of a grid of several was chosen: a better penalty may lie beyond it
    grid: tuple[Fit, ...]  # every penalty, the strongest first; empty if there was no choice
    fitted_images: int  # N, training and validation images
    validation_images: int
    iterations: int  # of the last fit
    unconverged: int  # fits that did not converge, the last one included

    @property
    def accuracy(self) -> float:
        """0..1."""
        return self.correct / self.images


def train_logistic(
    train: Features,
    test: Features,
    *,
    seed: int,
    validation: Features | None = None,
    validation_share: float = VALIDATION_SHARE,
    strengths: Sequence[float] = GRID,
    metric: Metric = "accuracy",
    max_iterations: int = MAX_ITERATIONS,
    on_fit: Callable[[Fit], None] = lambda done: None,
) -> LogisticScore:
    """Choose the penalty, fit on all labelled images, score the test images.

    Features are L2-normalised, then standardised by mean and variance of the images of the fit. scikit-learn's C weighs
    the *sum* of the losses against |weights|²/2, so that the same C is a weaker penalty for more images. The grid is
    therefore one of lambda, the penalty of the mean loss, and C = 1 / (lambda N) with N the images of that fit: the
    chosen strength means the same when the validation images join in. With two classes scikit-learn fits one vector of
    weights rather than two that are each other's negative, on which the same lambda weighs twice as much.

    All is float64, 8 N F bytes a few times over. scikit-learn's L-BFGS takes float32 too (1.9; older releases convert),
    but the rounding of a float32 loss hides what little changes under a strong penalty, and such fits were seen to end
    far from their optimum. The grid goes from strong to weak penalties, each fit beginning where the one before ended;
    the last fit, on all images, begins at zero, so that it can be repeated alone.

    Args:
        train: finite features of labelled images.
        test: the same, judged; a class that no fitted image has is never guessed.
        seed: with the ids alone determines which images validate.
        validation: images to choose the penalty by; None: a part of the training images.
        validation_share: of each class's training images, 0..1, at least one image where there are two; a class with a
            single image stays in training.
        strengths: penalties lambda > 0, in any order. Only one: nothing is chosen, and all images are fitted at once.
        metric: by which the penalty is chosen; of equally good ones the strongest.
        max_iterations: L-BFGS iterations of one fit.
        on_fit: told after each penalty.

    Raises:
        UserError: if the images to fit are of fewer than two classes, or none is left to choose the penalty by.
    """
    assert len(test.ids) > 0
    assert strengths
    assert 0 < validation_share < 1
    falling = sorted(set(strengths), reverse=True)
    whole = _arrays(train)
    fitted, held = whole, whole[:0]
    if validation is not None:
        held = _arrays(validation)
        whole = _Labelled(np.concatenate([whole.x, held.x]), np.concatenate([whole.y, held.y]))
    elif len(falling) > 1:
        chosen = validating(whole.y, train.ids.numpy(), validation_share, seed=seed)  # [N]
        fitted, held = whole[~chosen], whole[chosen]
    _check_classes(fitted.y)
    tried = _try_all(fitted, held, falling, metric, max_iterations, on_fit) if len(falling) > 1 else []
    strength = max(tried, key=lambda fit: fit.score).strength if tried else falling[0]  # max takes the first of equals
    c = 1 / (strength * len(whole.y))
    pipeline, converged = _fit(_pipeline(C=c, max_iter=max_iterations), whole)
    judged = _arrays(test)
    guesses = pipeline.predict(judged.x)
    return LogisticScore(
        correct=int((guesses == judged.y).sum()),
        images=len(judged.y),
        mean_per_class=mean_per_class(guesses, judged.y),
        classes=len(np.unique(judged.y)),
        metric=metric,
        strength=strength,
        c=c,
        at_edge=bool(tried) and strength in (falling[0], falling[-1]),
        grid=tuple(tried),
        fitted_images=len(whole.y),
        validation_images=len(held.y),
        iterations=int(pipeline[-1].n_iter_.max()),
        unconverged=sum(not fit.converged for fit in tried) + (not converged),
    )


def validating(labels: NDArray[np.int64], ids: NDArray[np.int64], share: float, *, seed: int) -> NDArray[np.bool_]:
    """Which of the images [N] validate: a `share` of each class, rounded, at least one and not all of it."""
    ranks = hash_counters(seed, 0, _SPLIT, ids)
    chosen = np.zeros(len(labels), bool)
    order = np.lexsort((ranks, labels))
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        chosen[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    return chosen


def mean_per_class(guesses: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """The share of each class's images that are right, averaged over the classes of `labels` [M]: 0..1."""
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return float((np.bincount(places, weights=guesses == labels) / counts).mean())


@dataclass(frozen=True, slots=True)
class _Labelled:
    x: NDArray[np.float64]  # [N, F]
    y: NDArray[np.int64]  # [N]

    def __getitem__(self, rows: slice | NDArray[np.bool_]) -> _Labelled:
        return _Labelled(self.x[rows], self.y[rows])


def _arrays(features: Features) -> _Labelled:
    assert features.labels is not None
    return _Labelled(features.embeddings.double().numpy(), features.labels.numpy())


def _check_classes(labels: NDArray[np.int64]) -> None:
    classes = np.unique(labels)
    if len(classes) < 2:
        raise UserError(
            f"the {len(labels):,} images to fit are of {len(classes)} class, and a classifier tells at least two apart;"
            " use data with more classes, or more images of them"
        )


def _try_all(
    fitted: _Labelled,
    held: _Labelled,
    strengths: Sequence[float],
    metric: Metric,
    max_iterations: int,
    on_fit: Callable[[Fit], None],
) -> list[Fit]:
    """Fit with each of the `strengths`, one after the other, and score the held images."""
    if not len(held.y):
        raise UserError(
            "no image is left to choose the regularisation by, since every class has only one; name a validation set, "
            "or use more images"
        )
    pipeline = _pipeline(warm_start=True, max_iter=max_iterations)
    scaler, classifier = pipeline[:-1], pipeline[-1]
    fitted, held = _Labelled(scaler.fit_transform(fitted.x), fitted.y), _Labelled(scaler.transform(held.x), held.y)
    tried: list[Fit] = []
    for strength in strengths:
        classifier.set_params(C=1 / (strength * len(fitted.y)))
        _, converged = _fit(classifier, fitted)
        guesses = classifier.predict(held.x)
        score = float(np.mean(guesses == held.y)) if metric == "accuracy" else mean_per_class(guesses, held.y)
        tried.append(
            Fit(
                strength=strength,
                score=score,
                iterations=int(classifier.n_iter_.max()),
                converged=converged,
                number=len(tried) + 1,
                fits=len(strengths),
            )
        )
        on_fit(tried[-1])
    return tried


def _pipeline(**settings: Any) -> Any:
    # Importing it takes a second, which the other evaluations need not wait for.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    classifier = LogisticRegression(solver="lbfgs", tol=TOLERANCE, **settings)
    return make_pipeline(Normalizer(), StandardScaler(), classifier)


def _fit(estimator: Any, images: _Labelled) -> tuple[Any, bool]:
    """The estimator, fitted, and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        estimator.fit(images.x, images.y)
    return estimator, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
