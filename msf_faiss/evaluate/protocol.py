"""What all evaluations have in common: features of the images, and the protocol that makes a number mean something."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import msf_faiss
from msf_faiss.config import Config
from msf_faiss.data.source import Source
from msf_faiss.embeddings.extract import Features
from msf_faiss.evaluate.feature_cache import Kept, digest_of
from msf_faiss.evaluate.inputs import finite_features, labelled_ids, sample
from msf_faiss.evaluate.results import EncoderName, EvaluationName, Result, Score
from msf_faiss.evaluate.setup import EvalSetup

Notify = Callable[[str], None]
"""Told in a line what happens next."""

_SPLITS = {"train": "training", "test": "held-out"}


def choose(setup: EvalSetup, limit: int | None = None) -> dict[str, Tensor]:
    """Ids [N] of each split's labelled images, at most `limit` of each: a sample that the config's seed determines.

    Raises:
        UserError: if a split has no labels.
    """
    return {
        split: sample(labelled_ids(source), limit, seed=setup.config.seed) for split, source in setup.splits.items()
    }


def compute_features(
    setup: EvalSetup,
    encoder: EncoderName,
    chosen: Mapping[str, Tensor],
    *,
    network: nn.Module | None = None,
    batch_size: int,
    notify: Notify,
) -> dict[str, Features]:
    """Centre-view features of the chosen images [N] of each split, from the setup's cache where it has them.

    Args:
        setup: weights and images; its ranks share the work, and each gets all features.
        encoder: whose.
        chosen: ids [N] for each split.
        network: the encoder, if there is one already.
        batch_size: images embedded at a time.
        notify: told what happens next.

    Raises:
        UserError: if an image is unreadable, the weights cannot be used, or a feature is not finite.
    """
    features = {}
    for split, ids in chosen.items():
        source, what = setup.splits[split], f"{len(ids):,} {_SPLITS[split]} images"
        kept = _recall(setup, encoder, split, ids)
        if all(setup.ranks.gather_objects(kept is not None)) and kept is not None:
            notify(f"{encoder}: kept features of {what}")
        else:
            notify(f"{encoder}: features of {what}")
            if network is None:
                with setup.ranks.report_on_main():
                    network = setup.encoder(encoder)
            kept = _compute(setup, network, source, ids, batch_size)
            if setup.cache is not None and setup.ranks.is_main:
                try:
                    setup.cache.put(_cached_as(setup, encoder, split, ids), kept)
                except OSError as error:
                    notify(f"the features are not kept in {setup.cache.folder}: {error.strerror or error}")
        labels = None if source.labels is None else torch.from_numpy(source.labels[kept.ids.numpy()])
        features[split] = Features(kept.embeddings, labels, kept.ids)
    return features


def _recall(setup: EvalSetup, encoder: EncoderName, split: str, ids: Tensor) -> Kept | None:
    """Kept features of the images `ids` [N]: by themselves, or among those of all labelled images."""
    if setup.cache is None:
        return None
    if split not in setup.identities:
        setup.identities[split] = setup.ranks.broadcast_object(setup.splits[split].identity())
    kept = setup.cache.get(_cached_as(setup, encoder, split, ids))
    if kept is None and len(ids) < len(every := labelled_ids(setup.splits[split])):
        whole = setup.cache.get(_cached_as(setup, encoder, split, every))
        if whole is not None:
            rows = torch.isin(whole.ids, ids)
            kept = Kept(whole.embeddings[rows], whole.ids[rows])
    return kept


def _cached_as(setup: EvalSetup, encoder: EncoderName, split: str, ids: Tensor) -> Path:
    assert setup.cache is not None
    weights, config = setup.weights, setup.config
    trained = encoder in weights.trained
    question = {
        "encoder": encoder,
        "weights": weights.digest if trained else None,
        "net": None if encoder == "pixels" else weights.net,
        "seed": config.seed if encoder == "untrained" else None,
        "view": view_protocol(config),
        "images": setup.identities[split],
        "ids": digest_of(ids),
        "unreadable": config.data.unreadable,
        "device": setup.device.type,
    }
    step = f"-step-{weights.step:08d}" if trained and weights.step is not None else ""
    return setup.cache.path(f"{encoder}{step}-{split}", question)


def _compute(setup: EvalSetup, network: nn.Module, source: Source, ids: Tensor, batch_size: int) -> Kept:
    ranks = setup.ranks
    shared = len(ids) >= ranks.size
    mine = ids[ranks.slice_of(len(ids))] if shared else ids
    found = ranks.on_all(
        lambda: finite_features(network, source, mine, config=setup.config, device=setup.device, batch_size=batch_size)
    )
    if not shared:
        return Kept(found.embeddings, found.ids)
    return Kept(ranks.gather_rows(found.embeddings), ranks.gather_rows(found.ids))


def view_protocol(config: Config) -> dict[str, Any]:
    """The centre view: shorter side and crop in pixels, and the normalisation."""
    views = config.views
    return {
        "resize": views.resize,
        "center_crop": views.size,
        "mean": list(views.mean),
        "std": list(views.std),
    }


def protocol_of(
    setup: EvalSetup,
    encoder: EncoderName,
    chosen: Mapping[str, Tensor],
    features: Mapping[str, Features],
    *,
    training_images: int | None = None,
) -> dict[str, Any]:
    """Data, view and network, in a form that JSON takes. `features` are those that are judged and that judge.

    `training_images`: how many labelled ones there are, where only some of them were chosen.
    """
    judged = features.get("test", features["train"])
    assert judged.labels is not None
    config, counts = setup.config, judged.labels.bincount()
    classes = setup.train.classes
    return {
        "data": {
            # How images are fetched does not change what they are.
            "config": config.data.model_dump(mode="json", exclude={"workers", "cache", "cache_dir", "download"}),
            "training_images": len(features["train"].ids) if training_images is None else training_images,
            "held_out_images": len(features["test"].ids) if "test" in features else None,
            "classes": len(classes) if classes is not None else len(counts),
            "commonest_class": int(counts.max()) / len(judged.ids),
            "left_out": {
                split: {
                    "unlabelled": int(np.sum(np.asarray(source.labels) < 0)),
                    "unreadable": len(chosen[split]) - len(features[split].ids),
                }
                for split, source in setup.splits.items()
            },
        },
        "view": view_protocol(config),
        "encoder": "the flattened view" if encoder == "pixels" else "backbone in eval mode, float32",
        "model": None if encoder == "pixels" else dict(setup.weights.net),
        "dimensions": judged.embeddings.shape[1],
        "seed": config.seed,
    }


def result_of(
    setup: EvalSetup,
    encoder: EncoderName,
    evaluation: EvaluationName,
    scores: list[Score],
    protocol: Mapping[str, Any],
    began: float,
) -> Result:
    """The result of what began at `began` (`time.perf_counter()`) and ends now."""
    weights = setup.weights
    trained = encoder in weights.trained
    path = weights.path if weights.run_dir is None else weights.path.relative_to(weights.run_dir)
    untrained = 0 if encoder == "untrained" else None
    return Result(
        evaluation=evaluation,
        encoder=encoder,
        checkpoint=path.as_posix() if trained else None,
        weights=weights.digest if trained else None,
        step=weights.step if trained else untrained,
        epoch=weights.epoch if trained else untrained,
        scores=tuple(scores),
        protocol=protocol,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=str(setup.device),
        seconds=round(time.perf_counter() - began, 3),
        versions={
            "msf_faiss": msf_faiss.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": sys.version.split()[0],
        },
    )
