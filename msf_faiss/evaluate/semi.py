"""Score one encoder with few labels: semi-supervised evaluation with a frozen or a fine-tuned backbone."""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from msf_faiss.evaluate.features import choose_images, compute_features
from msf_faiss.evaluate.finetune import FinetuneSettings, finetune, published_settings, score_network
from msf_faiss.evaluate.linear import EpochProgress, still_falls
from msf_faiss.evaluate.protocol import common_protocol, make_result
from msf_faiss.evaluate.results import EvalEncoder, Result
from msf_faiss.evaluate.scoring import (
    count_classes,
    linear_metric,
    linear_protocol,
    notify_unconverged,
    top_scores,
    train_linear,
)
from msf_faiss.evaluate.setup import EvalSetup
from msf_faiss.evaluate.subsets import balanced_subset, listed_subset

Mode = Literal["linear", "fine-tune"]
"""Train a linear layer on the frozen backbone, or the whole network."""

FRACTIONS = (0.01, 0.1)
"""Fractions of the labels that papers report."""


def score_semi(
    setup: EvalSetup,
    encoder: EvalEncoder,
    *,
    labels: float | Path,
    mode: Mode,
    fast: bool = False,
    epochs: int | None = None,
    changes: Mapping[str, Any] | None = None,
    subset_seed: int = 0,
) -> Result:
    """Accuracy with few labels, of a linear layer (see `linear`) or of a fine-tuned network (see `finetune`).

    Args:
        setup: weights and images.
        encoder: name of the encoder.
        labels: fraction of the labels to keep, the same number per class; or a file that lists the labelled images.
        mode: frozen or fine-tuned backbone.
        fast: for the linear layer: train on the features of centre views instead of random crops.
        epochs: of the linear layer; None: 40, as in the paper, or more on few images (see `linear.default_epochs`).
        changes: to the published settings of fine-tuning, by name.
        subset_seed: determines which images keep their labels, the same for every encoder and run.

    Raises:
        UserError: if there are no held-out images, images have no labels or are unreadable, the list of images, the
            weights or features are invalid, or fine-tuning diverges.
    """
    start = time.perf_counter()
    with setup.ranks.report_on_main():
        test = setup.held_out("semi-supervised evaluation")
        chosen = choose_images(setup)
        subset = (
            listed_subset(setup.train, labels)
            if isinstance(labels, Path)
            else balanced_subset(setup.train, labels, seed=subset_seed)
        )
        network = None if fast and mode == "linear" else setup.encoder(encoder)
    few = chosen | {"train": subset.ids}
    features = compute_features(setup, encoder, few, network=network)
    train = features["train"]
    setup.notify(f"{encoder}: {mode} on {len(train.ids):,} labelled images")
    amount = f"{len(subset.ids):,} labels" if isinstance(labels, Path) else f"{100 * labels:g} % of labels"
    if mode == "linear":
        score = train_linear(setup, network, train, features["test"], epochs=epochs)
        details = linear_protocol(fast, epochs, len(train.ids))
        metric = linear_metric(fast, epochs, len(train.ids), f", {amount}")
    else:
        assert network is not None
        assert train.labels is not None
        published = published_settings(len(subset.ids) / len(chosen["train"]), len(subset.ids))
        settings = replace(published, **(changes or {}))
        common: dict[str, Any] = {
            "config": setup.config,
            "device": setup.device,
            "classes": int(train.labels.max()) + 1,
            "settings": settings,
            "ranks": setup.ranks,
        }
        losses: list[float] = []

        def on_epoch(progress: EpochProgress) -> None:
            losses.append(progress.loss)
            setup.on_progress(progress)

        tuned = finetune(network, setup.train, train.ids, on_epoch=on_epoch, **common)
        score = score_network(tuned, test, features["test"].ids, **common)
        score = replace(score, converged=not still_falls(losses, settings.milestones[0]))
        details = _finetune_protocol(settings)
        metric = f"fine-tune, {amount}{_changed_settings(settings, published)}"
    notify_unconverged(setup, f"{encoder}: {metric}", score)
    protocol = {
        **common_protocol(setup, encoder, few, features, training_images=len(chosen["train"])),
        "labels": dict(subset.description),
        **details,
    }
    scores = top_scores(metric, score, classes=count_classes(train), labels=len(subset.ids))
    return make_result(setup, encoder, "semi-linear" if mode == "linear" else "semi-fine-tune", scores, protocol, start)


def _finetune_protocol(settings: FinetuneSettings) -> dict[str, Any]:
    view = settings.view.model_dump(mode="json")
    return {
        "encoder": "the whole network, fine-tuned",
        "fine_tune": asdict(settings) | {"view": view, "drops_after_epochs": settings.milestones},
        "reported": "after the last epoch",
    }


def _changed_settings(settings: FinetuneSettings, published: FinetuneSettings) -> str:
    """The part of a metric's name that says how fine-tuning differed from the published settings."""
    epochs = "" if settings.epochs == published.epochs else f", {settings.epochs} epochs"
    if replace(settings, epochs=published.epochs) == published:
        return epochs
    return f"{epochs}, rates {settings.backbone_learning_rate:g} and {settings.head_learning_rate:g}"
