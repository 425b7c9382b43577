"""The semi-supervised evaluations of one encoder: few training images keep their labels; from images to a `Result`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from msf_faiss.evaluate import linear
from msf_faiss.evaluate.finetune import FinetuneEpoch, finetune, settings_for
from msf_faiss.evaluate.linear import LinearScore, ProbeEpoch
from msf_faiss.evaluate.protocol import Notify, choose, compute_features, protocol_of, result_of
from msf_faiss.evaluate.results import EncoderName, Result, Score
from msf_faiss.evaluate.scoring import linear_protocol, probe
from msf_faiss.evaluate.setup import EvalSetup
from msf_faiss.evaluate.subsets import Subset, balanced_subset, listed_subset

Mode = Literal["linear", "fine-tune"]
"""The backbone frozen, or trained with the layer."""

FRACTIONS = (0.01, 0.1)
"""Shares of the labels that papers report."""


def score_semi(
    setup: EvalSetup,
    encoder: EncoderName,
    *,
    labels: float | Path,
    mode: Mode,
    fast: bool = False,
    epochs: int = linear.EPOCHS,
    changes: Mapping[str, Any] | None = None,
    subset_seed: int = 0,
    batch_size: int = 256,
    on_epoch: Callable[[ProbeEpoch | FinetuneEpoch], None] = lambda done: None,
    notify: Notify = lambda line: None,
) -> Result:
    """Accuracy with few labels: of a linear layer as in `linear`, or of the whole network as in `finetune`.

    Args:
        setup: weights and images, held-out ones among them.
        encoder: which backbone.
        labels: the fraction of the labels that is kept, the same number of each class, or a file that lists the images.
        mode: whether the backbone stays as it is.
        fast: for the linear layer: features of centre views instead of random crops.
        epochs: of the linear layer; 40 in the paper.
        changes: to the settings of a fine-tune that were published for the fraction of labels, by name.
        subset_seed: which images keep their labels; the same for every encoder and run.
        batch_size: images embedded at a time under the centre view.
        on_epoch: told after each epoch.
        notify: told what happens next.

    Raises:
        UserError: if there are no held-out images, images have no labels or cannot be read, the list of images is
            wrong, weights or features cannot be used, or a fine-tune diverges.
    """
    began = time.perf_counter()
    with setup.ranks.report_on_main():
        test = setup.held_out("semi-supervised evaluation")
        chosen = choose(setup)
        subset = (
            listed_subset(setup.train, labels)
            if isinstance(labels, Path)
            else balanced_subset(setup.train, labels, seed=subset_seed)
        )
        network = None if fast and mode == "linear" else setup.encoder(encoder)
    few = chosen | {"train": subset.ids}
    share = len(subset.ids) / len(chosen["train"])
    features = compute_features(setup, encoder, few, network=network, batch_size=batch_size, notify=notify)
    protocol = {
        **protocol_of(setup, encoder, few, features, training_images=len(chosen["train"])),
        "labels": dict(subset.description),
    }
    train_ids, test_ids = features["train"].ids, features["test"].ids
    notify(f"{encoder}: {mode} on {len(train_ids):,} labelled images")
    rates = ""
    if mode == "linear":
        score = probe(setup, network, features["train"], features["test"], epochs=epochs, on_epoch=on_epoch)
        protocol |= linear_protocol(fast, epochs)
        name = f"linear{' (fast)' if fast else ''}"
        usual = epochs == linear.EPOCHS
    else:
        assert network is not None
        assert features["train"].labels is not None
        published = settings_for(share, len(subset.ids))
        settings = replace(published, **(changes or {}))
        usual = settings.epochs == published.epochs
        if replace(settings, epochs=published.epochs) != published:
            rates = f", rates {settings.backbone_learning_rate:g} and {settings.head_learning_rate:g}"
        score = finetune(
            network,
            setup.train,
            train_ids,
            test,
            test_ids,
            config=setup.config,
            device=setup.device,
            classes=int(features["train"].labels.max()) + 1,
            settings=settings,
            ranks=setup.ranks,
            on_epoch=on_epoch,
        )
        epochs = settings.epochs
        view = settings.view.model_dump(mode="json")
        protocol |= {
            "encoder": "the whole network, trained",
            "fine_tune": asdict(settings) | {"view": view, "drops_after_epochs": settings.milestones},
            "reported": "after the last epoch",
        }
        name = "fine-tune"
    metric = f"{name}, {_amount(labels, subset)}{'' if usual else f', {epochs} epochs'}{rates}"
    scores = [_score(metric, score, 1, score.top1, len(subset.ids))]
    if score.top5 is not None:
        scores.append(_score(f"{metric}, top 5", score, 5, score.top5, len(subset.ids)))
    return result_of(setup, encoder, "semi-linear" if mode == "linear" else "semi-fine-tune", scores, protocol, began)


def _amount(labels: float | Path, subset: Subset) -> str:
    return f"{len(subset.ids):,} labels" if isinstance(labels, Path) else f"{100 * labels:g} % of labels"


def _score(metric: str, score: LinearScore, top: int, correct: int, labels: int) -> Score:
    return Score(
        metric=metric,
        accuracy=correct / score.images,
        correct=correct,
        images=score.images,
        settings={"top": top, "labels": labels},
    )
