"""Logistic regression on frozen features: the transfer protocol of SimCLR, BYOL and MSF.

As in SimCLR (Chen et al. 2020), BYOL (Grill et al. 2020) and MSF, the l2 penalty is chosen on validation images from a
logarithmic grid, the classifier is refitted on training and validation images, and tested once. scikit-learn does the
arithmetic: a score equals that of

    make_pipeline(Normalizer(), StandardScaler(), LogisticRegression(C=score.c, tol=TOLERANCE, max_iter=MAX_ITERATIONS))

fitted on the same features in float64.

Shapes: N images of a fit, M test images, F features, C classes.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from msf_faiss.counter_rng import hash_counters
from msf_faiss.embeddings.extract import Features
from msf_faiss.errors import UserError
from msf_faiss.evaluate.accuracy import mean_per_class
from msf_faiss.threads import limit_blas

Metric = Literal["accuracy", "mean-per-class"]
"""Accuracy over all images, or the mean of the classes' accuracies, as is usual for unbalanced data (Caltech-101, Pets,
Flowers, Aircraft)."""

GRID = tuple(float(penalty) for penalty in np.logspace(-6, 5, 45))
"""The papers' 45 penalties, from 1e-6 to 1e5: lambda in mean loss + lambda/2 · |weights|²."""
FAST_GRID = GRID[::4]
VALIDATION_SHARE = 0.2  # of each class's training images
TOLERANCE = 1e-4
"""A fit ends when no component of the mean loss's gradient is larger (scikit-learn's default). At penalties so weak
that the initial weights already satisfy this, the weights do not change. With 512 correlated features, 1e-5 took four
times as long and chose the same penalty with the same score."""
MAX_ITERATIONS = 1000
"""L-BFGS iterations of a fit; with this tolerance only the weakest penalties come close."""

_SPLIT_STREAM = 6  # of counter_rng; others are in evaluate/images, evaluate/subsets and views


@dataclass(frozen=True, slots=True, kw_only=True)
class PenaltyFit:
    """One penalty of the grid, scored on the validation images."""

    penalty: float  # lambda
    score: float  # 0..1, by the metric
    metric: Metric
    iterations: int
    converged: bool  # False: it reached the limit of iterations, or the line search failed
    number: int  # 1, 2, ..., largest penalty first
    fits: int  # of the grid


@dataclass(frozen=True, slots=True, kw_only=True)
class LogisticScore:
    """Test scores of the classifier fitted on training and validation images."""

    correct: int
    images: int
    mean_per_class: float  # 0..1, over the classes of the test images
    classes: int  # of the test images
    metric: Metric  # that chose the penalty
    penalty: float  # lambda, chosen
    c: float  # scikit-learn's C of the last fit: 1 / (lambda N)
    at_edge: bool  # the chosen penalty is the first or last of several, so a better one may lie outside the grid
    grid: tuple[PenaltyFit, ...]  # largest penalty first; empty if there was only one
    fitted_images: int  # N of the last fit: training and validation images
    validation_images: int
    iterations: int  # of the last fit
    unconverged: int  # number of fits that did not converge, including the last

    @property
    def accuracy(self) -> float:
        """0..1."""
        return self.correct / self.images


def train_logistic(
    train: Features,
    test: Features,
    *,
    seed: int,
    penalties: Sequence[float] = GRID,
    metric: Metric = "accuracy",
    max_iterations: int = MAX_ITERATIONS,
    on_fit: Callable[[PenaltyFit], None] = lambda fit: None,
) -> LogisticScore:
    """Choose the penalty on a fifth of each class, refit on all training images, and score the test images.

    Features are L2-normalised, then standardised by the mean and variance of the fitted images. scikit-learn's C weighs
    the *sum* of the losses against |weights|²/2, so that the same C is a weaker penalty for more images. The grid is
    therefore one of lambda, the penalty of the mean loss, and C = 1 / (lambda N) with N the images of that fit: the
    chosen penalty means the same once the validation images are included. With two classes, scikit-learn fits one
    weight vector rather than two opposite ones, to which the same lambda is a penalty twice as strong.

    Everything is float64 and takes a few times 8 N F bytes. scikit-learn's L-BFGS also accepts float32 (from 1.9 on;
    older releases convert), but under a strong penalty the rounding of a float32 loss hides its small changes, and
    some fits ended far from their optimum. The grid runs from strong to weak penalties, and each fit starts from the
    weights of the one before; the last fit, on all images, starts from zero, so that it can be reproduced alone.

    Args:
        train: finite features of labelled images.
        test: finite features of labelled images; a class without training images is never predicted.
        seed: determines, with the ids, which images are validation images.
        penalties: lambda > 0, in any order; with only one, nothing is chosen and all images are fitted at once.
        metric: chooses the penalty; the largest wins ties.
        max_iterations: L-BFGS iterations of one fit.
        on_fit: called after each penalty of the grid.

    Raises:
        UserError: if the training images have fewer than two classes, or leave no validation images.
    """
    assert len(test.ids) > 0
    assert penalties
    descending = sorted(set(penalties), reverse=True)
    images = _to_arrays(train)
    fits: list[PenaltyFit] = []
    validation = np.zeros(len(images.y), bool)  # [N]
    if len(descending) > 1:
        validation = choose_validation(images.y, train.ids.numpy(), VALIDATION_SHARE, seed=seed)
    _check_classes(images.y[~validation])
    judged = _to_arrays(test)
    importlib.import_module("sklearn.linear_model")  # loads SciPy's BLAS
    with limit_blas(images.x.size * len(np.unique(images.y)), torch.get_num_threads()):
        if len(descending) > 1:
            fits = _fit_grid(images[~validation], images[validation], descending, metric, max_iterations, on_fit)
        # max returns the first of equals
        penalty = max(fits, key=lambda fit: fit.score).penalty if fits else descending[0]
        c = 1 / (penalty * len(images.y))
        pipeline, converged = _fit(_pipeline(C=c, max_iter=max_iterations), images)
        guesses = pipeline.predict(judged.x)
    return LogisticScore(
        correct=int((guesses == judged.y).sum()),
        images=len(judged.y),
        mean_per_class=mean_per_class(guesses, judged.y),
        classes=len(np.unique(judged.y)),
        metric=metric,
        penalty=penalty,
        c=c,
        at_edge=bool(fits) and penalty in (descending[0], descending[-1]),
        grid=tuple(fits),
        fitted_images=len(images.y),
        validation_images=int(validation.sum()),
        iterations=int(pipeline[-1].n_iter_.max()),
        unconverged=sum(not fit.converged for fit in fits) + (not converged),
    )


def choose_validation(
    labels: NDArray[np.int64], ids: NDArray[np.int64], share: float, *, seed: int
) -> NDArray[np.bool_]:
    """Mask [N] of the validation images: a rounded `share` of each class, at least one image but not all of them."""
    ranks = hash_counters(seed, 0, _SPLIT_STREAM, ids)
    chosen = np.zeros(len(labels), bool)
    order = np.lexsort((ranks, labels))
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        chosen[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    return chosen


@dataclass(frozen=True, slots=True)
class _Labelled:
    x: NDArray[np.float64]  # [N, F]
    y: NDArray[np.int64]  # [N]

    def __getitem__(self, rows: NDArray[np.bool_]) -> _Labelled:
        return _Labelled(self.x[rows], self.y[rows])


def _to_arrays(features: Features) -> _Labelled:
    assert features.labels is not None
    return _Labelled(features.embeddings.double().numpy(), features.labels.numpy())


def _check_classes(labels: NDArray[np.int64]) -> None:
    classes = np.unique(labels)
    if len(classes) < 2:
        raise UserError(
            f"logistic regression needs at least two classes, but the {len(labels):,} images to fit have "
            f"{len(classes)}; use data with more classes, or more images"
        )


def _fit_grid(
    train: _Labelled,
    validation: _Labelled,
    penalties: Sequence[float],
    metric: Metric,
    max_iterations: int,
    on_fit: Callable[[PenaltyFit], None],
) -> list[PenaltyFit]:
    if not len(validation.y):
        raise UserError(
            "no image is left to choose the penalty on, because every class has a single image; use more images"
        )
    pipeline = _pipeline(warm_start=True, max_iter=max_iterations)
    scaler, classifier = pipeline[:-1], pipeline[-1]
    train = _Labelled(scaler.fit_transform(train.x), train.y)
    validation = _Labelled(scaler.transform(validation.x), validation.y)
    fits: list[PenaltyFit] = []
    for penalty in penalties:
        classifier.set_params(C=1 / (penalty * len(train.y)))
        _, converged = _fit(classifier, train)
        guesses = classifier.predict(validation.x)
        correct = guesses == validation.y
        fits.append(
            PenaltyFit(
                penalty=penalty,
                score=float(np.mean(correct)) if metric == "accuracy" else mean_per_class(guesses, validation.y),
                metric=metric,
                iterations=int(classifier.n_iter_.max()),
                converged=converged,
                number=len(fits) + 1,
                fits=len(penalties),
            )
        )
        on_fit(fits[-1])
    return fits


def _pipeline(**settings: Any) -> Any:
    # The import takes a second, which other evaluations need not wait for.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    classifier = LogisticRegression(solver="lbfgs", tol=TOLERANCE, **settings)
    return make_pipeline(Normalizer(), StandardScaler(), classifier)


def _fit(estimator: Any, images: _Labelled) -> tuple[Any, bool]:
    """The fitted estimator, and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        estimator.fit(images.x, images.y)
    return estimator, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
