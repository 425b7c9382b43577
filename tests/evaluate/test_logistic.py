import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from msf_faiss.embeddings.extract import Features
from msf_faiss.errors import UserError
from msf_faiss.evaluate.accuracy import mean_per_class
from msf_faiss.evaluate.logistic import (
    GRID,
    VALIDATION_SHARE,
    PenaltyFit,
    choose_validation,
    train_logistic,
)

COARSE = [10.0**power for power in (1, 0, -1, -2, -3)]


def features(counts: list[int], seed: int, *, spread: float = 1.5, dim: int = 6) -> Features:
    """Loose clusters, one per class, with the given numbers of images."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(counts)), counts))
    centres = np.random.default_rng(99).normal(size=(len(counts), dim)) + 2
    points = centres[labels] + spread * random.normal(size=(len(labels), dim))
    return Features(torch.from_numpy(points).float(), torch.from_numpy(labels), torch.arange(len(labels)) * 3)


def arrays(of: Features) -> tuple[np.ndarray, np.ndarray]:
    assert of.labels is not None
    return of.embeddings.numpy().astype(np.float64), of.labels.numpy()


def plain() -> Pipeline:
    return Pipeline(
        [
            ("unit", Normalizer()),
            ("standard", StandardScaler()),
            ("classifier", LogisticRegression(tol=1e-4, max_iter=1000)),
        ]
    )


def slow_mean_per_class(guesses: list[int], labels: list[int]) -> float:
    right = defaultdict(list)
    for guess, label in zip(guesses, labels, strict=True):
        right[label].append(guess == label)
    return sum(sum(each) / len(each) for each in right.values()) / len(right)


@pytest.mark.parametrize("counts", [[90, 70, 50, 30], [80, 60]], ids=["4-classes", "2-classes"])
def test_equals_plain_scikit_learn(counts: list[int]) -> None:
    train, test = features(counts, 0), features([40] * len(counts), 1)
    score = train_logistic(train, test, seed=3, penalties=COARSE)
    (x, y), judged = arrays(train), arrays(test)
    chosen = choose_validation(y, train.ids.numpy(), VALIDATION_SHARE, seed=3)
    # scikit-learn's grid search starts each penalty from zero.
    fitted = int((~chosen).sum())
    search = GridSearchCV(
        plain(),
        {"classifier__C": [1 / (penalty * fitted) for penalty in COARSE]},
        cv=PredefinedSplit(np.where(chosen, 0, -1)),
        refit=False,
    ).fit(x, y)
    expected = search.cv_results_["mean_test_score"]
    # A fit from zero and one from the stronger penalty's weights end at different points with a gradient below 1e-4, so
    # an image at the decision boundary may be classified differently.
    scores = [fit.score for fit in score.grid]
    assert scores == pytest.approx(expected.tolist(), abs=1.01 / int(chosen.sum()))
    assert [fit.penalty for fit in score.grid] == COARSE
    assert score.penalty == COARSE[int(np.argmax(scores))]
    assert (score.fitted_images, score.validation_images) == (len(y), int(chosen.sum()))
    assert score.c == pytest.approx(1 / (score.penalty * len(y)))
    # The last fit starts from zero, so it can be reproduced exactly.
    again = plain().set_params(classifier__C=score.c).fit(x, y)
    guesses = again.predict(judged[0])
    assert (score.correct, score.images) == (int((guesses == judged[1]).sum()), len(judged[1]))
    assert score.accuracy == again.score(*judged)
    assert score.mean_per_class == pytest.approx(slow_mean_per_class(guesses.tolist(), judged[1].tolist()))
    assert score.iterations == again[-1].n_iter_.max()
    assert (score.unconverged, score.classes) == (0, len(counts))
    assert 0.5 < score.accuracy < 1


def test_grid_of_the_papers() -> None:
    assert len(GRID) == 45
    assert (GRID[0], GRID[-1]) == (1e-6, 1e5)
    assert np.diff(np.log10(GRID)) == pytest.approx(0.25)
    seen: list[PenaltyFit] = []
    score = train_logistic(features([30, 30], 0), features([9, 9], 1), seed=0, on_fit=seen.append)
    assert [fit.penalty for fit in seen] == sorted(GRID, reverse=True)
    assert tuple(seen) == score.grid
    assert [(fit.number, fit.fits) for fit in seen] == [(number, 45) for number in range(1, 46)]


def test_mean_per_class_equals_a_loop() -> None:
    random = np.random.default_rng(0)
    labels = random.choice([1, 4, 5, 9], p=[0.7, 0.2, 0.05, 0.05], size=300)
    guesses = np.where(random.random(300) < 0.6, labels, random.integers(10, size=300))
    expected = slow_mean_per_class(guesses.tolist(), labels.tolist())
    assert mean_per_class(guesses, labels) == pytest.approx(expected)
    assert mean_per_class(guesses, labels) != pytest.approx(float(np.mean(guesses == labels)), abs=1e-3)
    assert mean_per_class(labels, labels) == 1
    assert mean_per_class(np.array([2, 3]), np.array([2, 2])) == 0.5


def test_metric_chooses_the_penalty() -> None:
    """A strong penalty favours the largest class, which costs the mean over classes more than the accuracy."""
    train, test = features([300, 30, 30], 2, spread=1.6), features([60, 9, 9], 1)
    scores = {
        metric: train_logistic(train, test, seed=0, penalties=COARSE, metric=metric)
        for metric in ("accuracy", "mean-per-class")
    }
    for metric, score in scores.items():
        assert score.metric == metric
        assert score.penalty == max(score.grid, key=lambda fit: (fit.score, fit.penalty)).penalty
    assert [fit.score for fit in scores["accuracy"].grid] != [fit.score for fit in scores["mean-per-class"].grid]
    assert scores["mean-per-class"].penalty < scores["accuracy"].penalty


def test_largest_penalty_wins_ties() -> None:
    train, test = features([40, 40], 0, spread=0.01), features([9, 9], 1, spread=0.01)
    score = train_logistic(train, test, seed=0, penalties=[0.01, 1.0, 0.1, 0.1])
    assert [(fit.penalty, fit.score) for fit in score.grid] == [(1.0, 1.0), (0.1, 1.0), (0.01, 1.0)]
    assert (score.penalty, score.at_edge) == (1.0, True)


def test_at_edge() -> None:
    train, test = features([60, 50, 40], 0, spread=2), features([9, 9, 9], 1)
    score = train_logistic(train, test, seed=0, penalties=[1e4, *COARSE, 1e-4])
    assert (score.penalty in (1e4, 1e-4)) == score.at_edge
    assert not score.at_edge
    edge = train_logistic(train, test, seed=0, penalties=[score.penalty, 1e5])
    assert edge.at_edge


def test_choose_validation_depends_on_seed_and_ids() -> None:
    labels = np.repeat([0, 1, 2, 3, 4], [50, 10, 3, 2, 1])
    ids = np.arange(len(labels)) * 7
    chosen = choose_validation(labels, ids, 0.2, seed=1)
    assert np.bincount(labels[chosen], minlength=5).tolist() == [10, 2, 1, 1, 0]  # a single image stays in training
    assert np.array_equal(chosen, choose_validation(labels, ids, 0.2, seed=1))
    assert not np.array_equal(chosen, choose_validation(labels, ids, 0.2, seed=2))
    shuffled = np.random.default_rng(0).permutation(len(ids))
    assert np.array_equal(chosen[shuffled], choose_validation(labels[shuffled], ids[shuffled], 0.2, seed=1))
    assert choose_validation(labels, ids, 0.999, seed=1).sum() == 49 + 9 + 2 + 1  # never a whole class


def test_same_seed_gives_the_same_score() -> None:
    train, test = features([60, 50, 40], 0), features([30, 30, 30], 1)
    one, two, other = (train_logistic(train, test, seed=seed, penalties=COARSE) for seed in (1, 1, 2))
    assert one == two
    assert one.grid != other.grid


def test_classes_with_a_single_image_are_fitted() -> None:
    train, test = features([30, 30, 1], 0, spread=0.2), features([5, 5, 5], 1, spread=0.2)
    score = train_logistic(train, test, seed=0, penalties=[1e-3, 1e-2])
    assert (score.fitted_images, score.validation_images) == (61, 12)
    assert (score.correct, score.classes) == (15, 3)  # including the third class
    singles, pair = features([1, 1, 1], 0), [1e-3, 1e-2]
    with pytest.raises(UserError, match="no image is left to choose the penalty on"):
        train_logistic(singles, test, seed=0, penalties=pair)
    only = train_logistic(singles, test, seed=0, penalties=[1e-3])
    assert (only.grid, only.validation_images, only.at_edge, only.penalty) == ((), 0, False, 1e-3)
    assert only.fitted_images == 3


def test_class_without_training_images_is_never_predicted() -> None:
    train, test = features([40, 40], 0), features([10, 10], 1)
    unknown = Features(test.embeddings, torch.full((20,), 7), test.ids)
    score = train_logistic(train, unknown, seed=0, penalties=COARSE)
    assert (score.correct, score.mean_per_class, score.classes) == (0, 0.0, 1)


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="at least two classes, but the 8 images to fit have 1"):
        train_logistic(features([10], 0), features([3], 1), seed=0)


def test_unconverged_fits_are_counted_without_warnings() -> None:
    train, test = features([60, 50, 40], 0), features([9, 9, 9], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = train_logistic(train, test, seed=0, penalties=COARSE, max_iterations=1)
    assert score.unconverged > 1
    assert score.unconverged == 1 + sum(not fit.converged for fit in score.grid)
    assert max(fit.iterations for fit in score.grid) == score.iterations == 1
    x, y = arrays(train)
    with pytest.warns(ConvergenceWarning):
        LogisticRegression(C=score.c, max_iter=1).fit(x, y)


def test_scaled_and_constant_features() -> None:
    train, test = features([60, 50, 40], 0), features([30, 30, 30], 1)

    def scaled(of: Features) -> Features:
        return of._replace(embeddings=of.embeddings * 8)

    assert train_logistic(train, test, seed=0, penalties=COARSE) == train_logistic(
        scaled(train), scaled(test), seed=0, penalties=COARSE
    )
    flat = Features(torch.ones(20, 3), torch.arange(20) % 2, torch.arange(20))
    assert train_logistic(flat, flat, seed=0, penalties=COARSE).correct == 10
