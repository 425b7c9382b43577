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
from msf_faiss.evaluate.logistic import GRID, Fit, mean_per_class, train_logistic, validating

COARSE = [10.0**power for power in (1, 0, -1, -2, -3)]


def features(counts: list[int], seed: int, *, spread: float = 1.5, dim: int = 6) -> Features:
    """Loose clusters, one a class, so many images of each."""
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
@pytest.mark.parametrize("own_validation", [True, False])
def test_it_equals_plain_scikit_learn(counts: list[int], own_validation: bool) -> None:
    train, test, extra = features(counts, 0), features([40] * len(counts), 1), features([25] * len(counts), 2)
    score = train_logistic(train, test, seed=3, validation=extra if own_validation else None, strengths=COARSE)
    (x, y), judged = arrays(train), arrays(test)
    if own_validation:
        chosen = np.repeat([False, True], [len(y), len(extra.ids)])
        x, y = np.concatenate([x, arrays(extra)[0]]), np.concatenate([y, arrays(extra)[1]])
    else:
        chosen = validating(y, train.ids.numpy(), 0.2, seed=3)
    # From zero for each penalty, and in scikit-learn's own search.
    fitted = int((~chosen).sum())
    search = GridSearchCV(
        plain(),
        {"classifier__C": [1 / (strength * fitted) for strength in COARSE]},
        cv=PredefinedSplit(np.where(chosen, 0, -1)),
        refit=False,
    ).fit(x, y)
    expected = search.cv_results_["mean_test_score"]
    # Fits from zero and from the stronger penalty's weights both end where the gradient is below 1e-4, but not in the
    # same point: an image that lies on the border may fall on either side of it.
    found = [fit.score for fit in score.grid]
    assert found == pytest.approx(expected.tolist(), abs=1.01 / int(chosen.sum()))
    assert [fit.strength for fit in score.grid] == COARSE
    assert score.strength == COARSE[int(np.argmax(found))]
    assert (score.fitted_images, score.validation_images) == (len(y), int(chosen.sum()))
    assert score.c == pytest.approx(1 / (score.strength * len(y)))
    # The last fit begins at zero: it can be repeated alone, to the last image.
    again = plain().set_params(classifier__C=score.c).fit(x, y)
    guesses = again.predict(judged[0])
    assert (score.correct, score.images) == (int((guesses == judged[1]).sum()), len(judged[1]))
    assert score.accuracy == again.score(*judged)
    assert score.mean_per_class == pytest.approx(slow_mean_per_class(guesses.tolist(), judged[1].tolist()))
    assert score.iterations == again[-1].n_iter_.max()
    assert (score.unconverged, score.classes) == (0, len(counts))
    assert 0.5 < score.accuracy < 1


def test_the_grid_is_the_papers() -> None:
    assert len(GRID) == 45
    assert (GRID[0], GRID[-1]) == (1e-6, 1e5)
    assert np.diff(np.log10(GRID)) == pytest.approx(0.25)
    seen: list[Fit] = []
    score = train_logistic(features([30, 30], 0), features([9, 9], 1), seed=0, on_fit=seen.append)
    assert [fit.strength for fit in seen] == sorted(GRID, reverse=True)
    assert tuple(seen) == score.grid
    assert [(fit.number, fit.fits) for fit in seen] == [(number, 45) for number in range(1, 46)]


def test_mean_per_class_equals_a_plain_loop() -> None:
    random = np.random.default_rng(0)
    labels = random.choice([1, 4, 5, 9], p=[0.7, 0.2, 0.05, 0.05], size=300)
    guesses = np.where(random.random(300) < 0.6, labels, random.integers(10, size=300))
    expected = slow_mean_per_class(guesses.tolist(), labels.tolist())
    assert mean_per_class(guesses, labels) == pytest.approx(expected)
    assert mean_per_class(guesses, labels) != pytest.approx(float(np.mean(guesses == labels)), abs=1e-3)
    assert mean_per_class(labels, labels) == 1
    assert mean_per_class(np.array([2, 3]), np.array([2, 2])) == 0.5


def test_the_metric_decides_which_penalty_is_chosen() -> None:
    """A strong penalty leaves small classes to the commonest one, which costs their mean more than the images'."""
    train, test = features([300, 12, 12], 0, spread=1.6), features([60, 9, 9], 1)
    validation = features([600, 20, 20], 2, spread=1.6)
    scores = {
        metric: train_logistic(train, test, seed=0, validation=validation, strengths=COARSE, metric=metric)
        for metric in ("accuracy", "mean-per-class")
    }
    for metric, score in scores.items():
        assert score.metric == metric
        assert score.strength == max(score.grid, key=lambda fit: (fit.score, fit.strength)).strength
    assert [fit.score for fit in scores["accuracy"].grid] != [fit.score for fit in scores["mean-per-class"].grid]
    assert scores["mean-per-class"].strength < scores["accuracy"].strength


def test_of_equally_good_penalties_the_strongest_is_chosen() -> None:
    train, test = features([40, 40], 0, spread=0.01), features([9, 9], 1, spread=0.01)
    score = train_logistic(train, test, seed=0, strengths=[0.01, 1.0, 0.1, 0.1])
    assert [(fit.strength, fit.score) for fit in score.grid] == [(1.0, 1.0), (0.1, 1.0), (0.01, 1.0)]
    assert (score.strength, score.at_edge) == (1.0, True)


def test_a_choice_within_the_grid_is_not_at_its_edge() -> None:
    train, test = features([60, 50, 40], 0, spread=2), features([9, 9, 9], 1)
    score = train_logistic(train, test, seed=0, strengths=[1e4, *COARSE, 1e-4])
    assert (score.strength in (1e4, 1e-4)) == score.at_edge
    assert not score.at_edge
    edge = train_logistic(train, test, seed=0, strengths=[score.strength, 1e5])
    assert edge.at_edge


def test_the_seed_alone_decides_which_images_validate() -> None:
    labels = np.repeat([0, 1, 2, 3, 4], [50, 10, 3, 2, 1])
    ids = np.arange(len(labels)) * 7
    chosen = validating(labels, ids, 0.2, seed=1)
    assert np.bincount(labels[chosen], minlength=5).tolist() == [10, 2, 1, 1, 0]  # one alone stays in training
    assert np.array_equal(chosen, validating(labels, ids, 0.2, seed=1))
    assert not np.array_equal(chosen, validating(labels, ids, 0.2, seed=2))
    shuffled = np.random.default_rng(0).permutation(len(ids))
    assert np.array_equal(chosen[shuffled], validating(labels[shuffled], ids[shuffled], 0.2, seed=1))
    assert validating(labels, ids, 0.999, seed=1).sum() == 49 + 9 + 2 + 1  # never all of a class


def test_the_same_seed_gives_the_same_score() -> None:
    train, test = features([60, 50, 40], 0), features([30, 30, 30], 1)
    one, two, other = (train_logistic(train, test, seed=seed, strengths=COARSE) for seed in (1, 1, 2))
    assert one == two
    assert one.grid != other.grid


def test_classes_of_one_image_are_fitted_all_the_same() -> None:
    train, test = features([30, 30, 1], 0, spread=0.2), features([5, 5, 5], 1, spread=0.2)
    score = train_logistic(train, test, seed=0, strengths=[1e-3, 1e-2])
    assert (score.fitted_images, score.validation_images) == (61, 12)
    assert (score.correct, score.classes) == (15, 3)  # the third class too
    singles, pair = features([1, 1, 1], 0), [1e-3, 1e-2]
    with pytest.raises(UserError, match="no image is left to choose the regularisation by"):
        train_logistic(singles, test, seed=0, strengths=pair)
    only = train_logistic(singles, test, seed=0, strengths=[1e-3])
    assert (only.grid, only.validation_images, only.at_edge, only.strength) == ((), 0, False, 1e-3)
    assert only.fitted_images == 3


def test_a_class_that_was_never_fitted_is_never_guessed() -> None:
    train, test = features([40, 40], 0), features([10, 10], 1)
    unknown = Features(test.embeddings, torch.full((20,), 7), test.ids)
    score = train_logistic(train, unknown, seed=0, strengths=COARSE)
    assert (score.correct, score.mean_per_class, score.classes) == (0, 0.0, 1)


def test_fewer_than_two_classes_are_refused() -> None:
    with pytest.raises(UserError, match="the 8 images to fit are of 1 class"):
        train_logistic(features([10], 0), features([3], 1), seed=0)
    with pytest.raises(UserError, match="of 1 class"):
        train_logistic(features([10], 0), features([3], 1), seed=0, validation=features([4, 4], 2))


def test_fits_that_do_not_converge_are_counted_and_nobody_is_warned() -> None:
    train, test = features([60, 50, 40], 0), features([9, 9, 9], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = train_logistic(train, test, seed=0, strengths=COARSE, max_iterations=1)
    assert score.unconverged > 1
    assert score.unconverged == 1 + sum(not fit.converged for fit in score.grid)
    assert max(fit.iterations for fit in score.grid) == score.iterations == 1
    x, y = arrays(train)
    with pytest.warns(ConvergenceWarning):
        LogisticRegression(C=score.c, max_iter=1).fit(x, y)


def test_lengths_of_features_do_not_matter_and_constant_ones_do_no_harm() -> None:
    train, test = features([60, 50, 40], 0), features([30, 30, 30], 1)

    def scaled(of: Features) -> Features:
        return of._replace(embeddings=of.embeddings * 8)

    assert train_logistic(train, test, seed=0, strengths=COARSE) == train_logistic(
        scaled(train), scaled(test), seed=0, strengths=COARSE
    )
    flat = Features(torch.ones(20, 3), torch.arange(20) % 2, torch.arange(20))
    assert train_logistic(flat, flat, seed=0, strengths=COARSE).correct == 10
