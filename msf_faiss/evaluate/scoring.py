"""One encoder, one evaluation: from images to a `Result` with its protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from msf_faiss.embeddings.extract import Features
from msf_faiss.evaluate import linear
from msf_faiss.evaluate.knn import KnnScore, knn_scores
from msf_faiss.evaluate.linear import FeatureBatches, LinearScore, ProbeEpoch
from msf_faiss.evaluate.protocol import Notify, choose, compute_features, protocol_of, result_of
from msf_faiss.evaluate.results import EncoderName, EvaluationName, Result, Score
from msf_faiss.evaluate.setup import EvalSetup


def score_knn(
    setup: EvalSetup,
    encoder: EncoderName,
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
    limit: int | None = None,
    batch_size: int = 256,
    notify: Notify = lambda line: None,
) -> Result:
    """kNN accuracy of one encoder's features (see `knn.knn_scores`), leave-one-out where there are no held-out images.

    Args:
        setup: checkpoint and images.
        encoder: which features.
        ks: numbers of voters, >= 1.
        temperatures: of the weighted votes, > 0.
        limit: most images to use of each set, a fixed sample; None: all.
        batch_size: images embedded at a time.
        notify: told what happens next.

    Raises:
        UserError: if images have no labels or cannot be read, or weights or features cannot be used.
    """
    began = time.perf_counter()
    with setup.ranks.report_on_main():
        chosen = choose(setup, limit)
    features = compute_features(setup, encoder, chosen, batch_size=batch_size, notify=notify)
    train, test = features["train"], features.get("test")
    notify(f"{encoder}: searching {len(train.ids):,} neighbours for {len((test or train).ids):,} images")
    scores = setup.ranks.on_main(lambda: knn_scores(train, test, ks=ks, temperatures=temperatures, device=setup.device))
    voters = len(train.ids) - (test is None)
    protocol = {
        **protocol_of(setup, encoder, chosen, features),
        "features": "L2-normalised",
        "search": "exact, cosine similarity",
        "leave_one_out": test is None,
        "k": sorted(set(ks)),
        "clamped_k": {str(k): voters for k in sorted(set(ks)) if k > voters},
        "temperatures": sorted(set(temperatures)),
        "vote": "majority (ties: larger sum of similarities, then the nearest); sum of exp(similarity / temperature)",
        "limit": limit,
    }
    return result_of(setup, encoder, "knn", [_knn_score(score) for score in scores], protocol, began)


def score_linear(
    setup: EvalSetup,
    encoder: EncoderName,
    *,
    fast: bool = False,
    epochs: int = linear.EPOCHS,
    batch_size: int = 256,
    on_epoch: Callable[[ProbeEpoch], None] = lambda done: None,
    notify: Notify = lambda line: None,
) -> Result:
    """Accuracy of a linear layer on one encoder's features, by the paper's protocol (see `linear`).

    Args:
        setup: checkpoint and images, held-out ones among them.
        encoder: which features.
        fast: train on the features of centre views instead of random crops.
        epochs: 40 in the paper.
        batch_size: images embedded at a time under the centre view; the layer itself trains on 256.
        on_epoch: told after each epoch.
        notify: told what happens next.

    Raises:
        UserError: if there are no held-out images, images have no labels or cannot be read, or weights or features
            cannot be used.
    """
    began = time.perf_counter()
    with setup.ranks.report_on_main():
        setup.held_out("a linear probe")
        chosen = choose(setup)
        network = None if fast else setup.encoder(encoder)
    features = compute_features(setup, encoder, chosen, network=network, batch_size=batch_size, notify=notify)
    train, test = features["train"], features["test"]
    notify(f"{encoder}: training a linear layer on {len(train.ids):,} images")
    score = probe(setup, network, train, test, epochs=epochs, on_epoch=on_epoch)
    protocol = {
        **protocol_of(setup, encoder, chosen, features),
        **linear_protocol(fast, epochs),
    }
    name: EvaluationName = "linear-fast" if fast else "linear"
    return result_of(setup, encoder, name, _linear_scores(score, fast, epochs), protocol, began)


def probe(
    setup: EvalSetup,
    network: nn.Module | None,
    train: Features,
    test: Features,
    *,
    epochs: int,
    on_epoch: Callable[[ProbeEpoch], None],
) -> LinearScore:
    """The full protocol with a `network`, whose features of each epoch the ranks share; the fast one without."""
    assert train.labels is not None
    config, device, ranks, classes = setup.config, setup.device, setup.ranks, int(train.labels.max()) + 1

    def trained(batches: FeatureBatches) -> LinearScore:
        return linear.train_probe(
            batches, train, test, classes=classes, device=device, seed=config.seed, epochs=epochs, on_epoch=on_epoch
        )

    if network is None:
        return ranks.on_main(lambda: trained(linear.cached_batches(train, seed=config.seed, device=device)))
    return trained(linear.augmented_batches(network, setup.train, train, config=config, device=device, ranks=ranks))


def linear_protocol(fast: bool, epochs: int) -> dict[str, Any]:
    """What decides the accuracy of a linear layer, beside the features."""
    return {
        "features": "L2-normalised, then standardised by the training set's mean and variance (centre views)",
        "training_view": "the centre view" if fast else {"random_resized_crop": [0.08, 1.0], "flip": 0.5},
        "epochs": epochs,
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


def _knn_score(score: KnnScore) -> Score:
    weighted = "" if score.temperature is None else f", T {score.temperature:g}"
    return Score(
        metric=f"{score.k}-NN{weighted}",
        accuracy=score.accuracy,
        correct=score.correct,
        images=score.images,
        settings={"k": score.k, "temperature": score.temperature},
    )


def _linear_scores(score: LinearScore, fast: bool, epochs: int) -> list[Score]:
    metric = f"linear{' (fast)' if fast else ''}{'' if epochs == linear.EPOCHS else f', {epochs} epochs'}"
    top = {1: score.top1} if score.top5 is None else {1: score.top1, 5: score.top5}
    return [
        Score(
            metric=metric if place == 1 else f"{metric}, top 5",
            accuracy=correct / score.images,
            correct=correct,
            images=score.images,
            settings={"top": place},
        )
        for place, correct in top.items()
    ]
