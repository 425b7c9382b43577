"""One encoder of a checkpoint, one evaluation: from images to a `Result` with its protocol."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import msf_faiss
from msf_faiss.data.base import Source
from msf_faiss.errors import UserError
from msf_faiss.evaluate import linear
from msf_faiss.evaluate.inputs import finite_features, labelled_ids, sample
from msf_faiss.evaluate.knn import KnnScore, knn_scores
from msf_faiss.evaluate.linear import LinearScore, ProbeEpoch
from msf_faiss.evaluate.results import EncoderName, EvaluationName, Result, Score
from msf_faiss.evaluate.subject import Subject
from msf_faiss.features import Features

Notify = Callable[[str], None]
"""Told in a line what happens next."""


def score_knn(
    subject: Subject,
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
        subject: checkpoint and images.
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
    chosen = {
        split: sample(labelled_ids(source), limit, seed=subject.config.seed) for split, source in _splits(subject)
    }
    features = _extract(subject, encoder, subject.encoder(encoder), chosen, batch_size, notify)
    train, test = features["train"], features.get("test")
    notify(f"{encoder}: searching {len(train.ids):,} neighbours for {len((test or train).ids):,} images")
    scores = knn_scores(train, test, ks=ks, temperatures=temperatures, device=subject.device)
    voters = len(train.ids) - (test is None)
    protocol = {
        **_protocol(subject, encoder, chosen, features),
        "features": "L2-normalised",
        "search": "exact, cosine similarity",
        "leave_one_out": test is None,
        "k": sorted(set(ks)),
        "clamped_k": {str(k): voters for k in sorted(set(ks)) if k > voters},
        "temperatures": sorted(set(temperatures)),
        "vote": "majority (ties: larger sum of similarities, then the nearest); sum of exp(similarity / temperature)",
        "limit": limit,
    }
    return _result(subject, encoder, "knn", [_knn_score(score) for score in scores], protocol, began)


def score_linear(
    subject: Subject,
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
        subject: checkpoint and images, held-out ones among them.
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
    if subject.test is None:
        raise UserError(
            "a linear layer is trained on one set of images and judged on another, and the config names no held-out "
            "images; name some with --set data.test_path=… (with data.kind=huggingface: data.test_split)"
        )
    chosen = {split: labelled_ids(source) for split, source in _splits(subject)}
    network = subject.encoder(encoder)
    features = _extract(subject, encoder, network, chosen, batch_size, notify)
    train, test, config = features["train"], features["test"], subject.config
    assert train.labels is not None
    notify(f"{encoder}: training a linear layer on {len(train.ids):,} images")
    if fast:
        batches = linear.cached_batches(train, seed=config.seed, device=subject.device)
    else:
        batches = linear.augmented_batches(network, subject.train, train.ids, config=config, device=subject.device)
    score = linear.train_probe(
        batches,
        train,
        test,
        classes=int(train.labels.max()) + 1,
        device=subject.device,
        seed=config.seed,
        epochs=epochs,
        on_epoch=on_epoch,
    )
    protocol = {
        **_protocol(subject, encoder, chosen, features),
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
    name: EvaluationName = "linear-fast" if fast else "linear"
    return _result(subject, encoder, name, _linear_scores(score, fast, epochs), protocol, began)


def _splits(subject: Subject) -> list[tuple[str, Source]]:
    return [("train", subject.train)] + ([("test", subject.test)] if subject.test is not None else [])


def _extract(
    subject: Subject,
    encoder: EncoderName,
    network: nn.Module,
    chosen: Mapping[str, Tensor],
    batch_size: int,
    notify: Notify,
) -> dict[str, Features]:
    """Centre-view features of the chosen images of each split."""
    features = {}
    for split, source in _splits(subject):
        notify(f"{encoder}: features of {len(chosen[split]):,} {'training' if split == 'train' else 'held-out'} images")
        features[split] = finite_features(
            network, source, chosen[split], config=subject.config, device=subject.device, batch_size=batch_size
        )
    return features


def _protocol(
    subject: Subject, encoder: EncoderName, chosen: Mapping[str, Tensor], features: Mapping[str, Features]
) -> dict[str, Any]:
    """What all evaluations have in common: data and view."""
    judged = features.get("test", features["train"])
    assert judged.labels is not None
    config, counts = subject.config, judged.labels.bincount()
    views = config.views
    classes = subject.train.classes
    return {
        "data": {
            # How images are fetched does not change what they are.
            "config": config.data.model_dump(mode="json", exclude={"workers", "cache", "cache_dir", "download"}),
            "training_images": len(features["train"].ids),
            "held_out_images": len(features["test"].ids) if "test" in features else None,
            "classes": len(classes) if classes is not None else len(counts),
            "commonest_class": int(counts.max()) / len(judged.ids),
            "left_out": {
                split: {
                    "unlabelled": int(np.sum(np.asarray(source.labels) < 0)),
                    "unreadable": len(chosen[split]) - len(features[split].ids),
                }
                for split, source in _splits(subject)
            },
        },
        "view": {
            "resize": views.resize,
            "center_crop": views.size,
            "mean": list(views.mean),
            "std": list(views.std),
        },
        "encoder": "the flattened view" if encoder == "pixels" else "backbone in eval mode, float32",
        "model": None if encoder == "pixels" else config.model.model_dump(mode="json"),
        "dimensions": judged.embeddings.shape[1],
        "seed": config.seed,
    }


def _result(
    subject: Subject,
    encoder: EncoderName,
    evaluation: EvaluationName,
    scores: list[Score],
    protocol: dict[str, Any],
    began: float,
) -> Result:
    checkpoint = subject.checkpoint
    trained = encoder in ("online", "target")
    path = checkpoint.path if checkpoint.run_dir is None else checkpoint.path.relative_to(checkpoint.run_dir)
    untrained = 0 if encoder == "untrained" else None
    return Result(
        evaluation=evaluation,
        encoder=encoder,
        checkpoint=path.as_posix() if trained else None,
        weights=checkpoint.files["model.safetensors"] if trained else None,
        step=checkpoint.step if trained else untrained,
        epoch=checkpoint.epoch if trained else untrained,
        scores=tuple(scores),
        protocol=protocol,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=str(subject.device),
        seconds=round(time.perf_counter() - began, 3),
        versions={
            "msf_faiss": msf_faiss.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": sys.version.split()[0],
        },
    )


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
