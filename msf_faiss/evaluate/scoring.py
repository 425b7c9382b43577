"""Score one encoder with kNN or with a linear probe."""

import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from msf_faiss.embeddings.extract import Features
from msf_faiss.evaluate import linear
from msf_faiss.evaluate.features import choose_images, compute_features
from msf_faiss.evaluate.knn import KnnScore, knn_scores
from msf_faiss.evaluate.linear import FeatureBatches, TopScore
from msf_faiss.evaluate.protocol import common_protocol, make_result
from msf_faiss.evaluate.results import EvalEncoder, Result, Score
from msf_faiss.evaluate.setup import EvalSetup


def score_knn(
    setup: EvalSetup,
    encoder: EvalEncoder,
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
    limit: int | None = None,
) -> Result:
    """kNN accuracy (see `knn.knn_scores`), leave-one-out if there are no held-out images.

    Args:
        setup: weights and images.
        encoder: name of the encoder.
        ks: numbers of voters, >= 1.
        temperatures: of the weighted votes, > 0.
        limit: maximum number of images of each set, a fixed sample; None: all.

    Raises:
        UserError: if images have no labels or are unreadable, or weights or features are invalid.
    """
    start = time.perf_counter()
    with setup.ranks.report_on_main():
        chosen = choose_images(setup, limit)
    features = compute_features(setup, encoder, chosen)
    train, test = features["train"], features.get("test")
    setup.notify(f"{encoder}: searching the neighbours of {len((test or train).ids):,} among {len(train.ids):,} images")
    scores = setup.ranks.on_main(lambda: knn_scores(train, test, ks=ks, temperatures=temperatures, device=setup.device))
    voters = len(train.ids) - (test is None)
    protocol = {
        **common_protocol(setup, encoder, chosen, features),
        "features": "L2-normalised",
        "search": "exact, cosine similarity",
        "leave_one_out": test is None,
        "k": sorted(set(ks)),
        "clamped_k": {str(k): voters for k in sorted(set(ks)) if k > voters},
        "temperatures": sorted(set(temperatures)),
        "vote": "majority (ties: larger sum of similarities, then the nearest); sum of exp(similarity / temperature)",
        "limit": limit,
    }
    named = [named for score in scores for named in _knn_scores(score)]
    return make_result(setup, encoder, "knn", named, protocol, start)


def score_linear(setup: EvalSetup, encoder: EvalEncoder, *, fast: bool = False, epochs: int | None = None) -> Result:
    """Accuracy of a linear probe by the paper's protocol (see `linear`).

    Args:
        setup: weights and images.
        encoder: name of the encoder.
        fast: train on the features of centre views instead of random crops.
        epochs: None: 40, as in the paper, or more on few images (see `linear.default_epochs`).

    Raises:
        UserError: if there are no held-out images, images have no labels or are unreadable, or weights or features are
            invalid.
    """
    start = time.perf_counter()
    with setup.ranks.report_on_main():
        setup.held_out("a linear probe")
        chosen = choose_images(setup)
        network = None if fast else setup.encoder(encoder)
    features = compute_features(setup, encoder, chosen, network=network)
    setup.notify(f"{encoder}: training a linear layer on {len(features['train'].ids):,} images")
    score = train_linear(setup, network, features["train"], features["test"], epochs=epochs)
    images = len(features["train"].ids)
    metric = linear_metric(fast, epochs, images)
    notify_unconverged(setup, f"{encoder}: {metric}", score)
    protocol = {**common_protocol(setup, encoder, chosen, features), **linear_protocol(fast, epochs, images)}
    scores = top_scores(metric, score, classes=count_classes(features["train"]))
    return make_result(setup, encoder, "linear-fast" if fast else "linear", scores, protocol, start)


def train_linear(
    setup: EvalSetup, network: nn.Module | None, train: Features, test: Features, *, epochs: int | None
) -> TopScore:
    """Train and score a linear layer: the full protocol with a `network`, whose work ranks share; without, the fast.

    `epochs`: see `score_linear`.
    """
    assert train.labels is not None
    config, device, ranks, classes = setup.config, setup.device, setup.ranks, int(train.labels.max()) + 1

    def probe(batches: FeatureBatches) -> TopScore:
        return linear.train_probe(
            batches,
            train,
            test,
            classes=classes,
            device=device,
            seed=config.seed,
            epochs=epochs or linear.default_epochs(len(train.ids)),
            on_epoch=setup.on_progress,
        )

    if network is None:
        return ranks.on_main(lambda: probe(linear.cached_batches(train, seed=config.seed, device=device)))
    batches = linear.augmented_batches(network, setup.train, train, config=config, device=device, ranks=ranks)
    if epochs is None and linear.default_epochs(len(train.ids)) > linear.EPOCHS:
        batches = linear.repeated_batches(batches, linear.EPOCHS)
    return probe(batches)


def linear_metric(fast: bool, epochs: int | None, images: int, amount: str = "") -> str:
    """The name of a linear layer's accuracy: that of the default protocol, or with its epochs."""
    changed = "" if epochs in (None, linear.default_epochs(images)) else f", {epochs} epochs"
    return f"linear{' (fast)' if fast else ''}{amount}{changed}"


def notify_unconverged(setup: EvalSetup, what: str, score: TopScore) -> None:
    """Say that the training loss was still falling, if it was."""
    if not score.converged:
        setup.notify(f"{what}: not converged, the training loss was still falling; train longer with --epochs")


def linear_protocol(fast: bool, epochs: int | None, images: int) -> dict[str, Any]:
    """The part of a protocol that describes a linear layer trained on so many `images`."""
    minimum = {}
    if epochs is None:
        epochs = linear.default_epochs(images)
        if epochs > linear.EPOCHS:
            minimum = {"minimum_steps": linear.MIN_STEPS} | ({} if fast else {"epochs_with_new_views": linear.EPOCHS})
    return {
        "features": "L2-normalised, then standardised by the training set's mean and variance (centre views)",
        "training_view": "the centre view" if fast else {"random_resized_crop": [0.08, 1.0], "flip": 0.5},
        "epochs": epochs,
        **minimum,
        "optimizer": {
            "name": "SGD",
            "learning_rate": linear.LEARNING_RATE,
            "momentum": linear.MOMENTUM,
            "weight_decay": linear.WEIGHT_DECAY,
            "batch_size": linear.BATCH_SIZE,
            "tenth_after_epochs": linear.milestones(epochs),
        },
        "reported": "after the last epoch",
    }


def count_classes(train: Features) -> int:
    """Number of classes that occur among the training images: the others are never learned."""
    assert train.labels is not None
    return len(set(train.labels.tolist()))


def top_scores(metric: str, score: TopScore, *, classes: int, **settings: int) -> list[Score]:
    """Top-1 accuracy as `metric`, its mean per class, and top-5 accuracy if more than five classes occur."""
    top = {1: score.top1, 5: score.top5} if classes > 5 else {1: score.top1}
    if not score.converged:
        settings["converged"] = False
    scores = [
        Score(
            metric=metric if rank == 1 else f"{metric}, top 5",
            accuracy=correct / score.images,
            correct=correct,
            images=score.images,
            settings={"top": rank, **settings},
        )
        for rank, correct in top.items()
    ]
    return [*scores, _mean_score(metric, score.mean_per_class, score.images, **settings)]


def _mean_score(metric: str, accuracy: float, images: int, **settings: float | None) -> Score:
    """The mean of the classes' accuracies, which no commonest class can flatter."""
    return Score(
        metric=f"{metric}, mean per class",
        accuracy=accuracy,
        correct=None,
        images=images,
        settings={"mean": "classes", **settings},
    )


def _knn_scores(score: KnnScore) -> list[Score]:
    """The accuracy of a vote, and of a majority vote also its mean per class."""
    weighted = "" if score.temperature is None else f", T {score.temperature:g}"
    metric, settings = f"{score.k}-NN{weighted}", {"k": score.k, "temperature": score.temperature}
    accuracy = Score(
        metric=metric, accuracy=score.accuracy, correct=score.correct, images=score.images, settings=settings
    )
    if score.temperature is not None:
        return [accuracy]
    return [accuracy, _mean_score(metric, score.mean_per_class, score.images, **settings)]
