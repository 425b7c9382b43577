"""The protocol of an evaluation, which says what its scores mean, and the result that carries both."""

import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import msf_faiss
from msf_faiss.embeddings.extract import Features, describe_view
from msf_faiss.evaluate.results import EvalEncoder, EvaluationName, Result, Score
from msf_faiss.evaluate.setup import EvalSetup


def common_protocol(
    setup: EvalSetup,
    encoder: EvalEncoder,
    chosen: Mapping[str, Tensor],
    features: Mapping[str, Features],
    *,
    training_images: int | None = None,
) -> dict[str, Any]:
    """The part of a protocol that all evaluations share: data, view and network, as JSON values.

    Args:
        setup: weights and images.
        encoder: name of the encoder.
        chosen: ids [N] by split.
        features: of the chosen images that are readable, by split.
        training_images: number of labelled training images, if only some of them were chosen.
    """
    judged = features.get("test", features["train"])
    assert judged.labels is not None
    assert setup.train.labels is not None
    config, counts = setup.config, judged.labels.bincount()
    known = np.unique(setup.train.labels[setup.train.labels >= 0])
    left_out = {
        split: {
            "unlabelled": int(np.sum(np.asarray(source.labels) < 0)),
            "unreadable": len(chosen[split]) - len(features[split].ids),
        }
        for split, source in setup.splits.items()
    }
    if setup.unlabelled_held_out:
        left_out["test"] = {"unlabelled": setup.unlabelled_held_out, "unreadable": 0}
    return {
        "data": {
            # Settings that change how images are read, but not the images, are left out.
            "config": config.data.model_dump(mode="json", exclude={"workers", "cache", "cache_dir", "download"}),
            "training_images": len(features["train"].ids) if training_images is None else training_images,
            "held_out_images": len(features["test"].ids) if "test" in features else None,
            "classes": len(known),  # that occur among the training images
            "chance": 1 / len(known),
            "commonest_class": int(counts.max()) / len(judged.ids),
            "unknown_class": int((~np.isin(judged.labels.numpy(), known)).sum()),  # images
            "left_out": left_out,
        },
        "view": describe_view(config.views),
        "encoder": "flattened pixels of the view" if encoder == "pixels" else "backbone in eval mode, float32",
        "model": None if encoder == "pixels" else dict(setup.weights.net),
        "dimensions": judged.embeddings.shape[1],
        "seed": config.seed,
    }


def make_result(
    setup: EvalSetup,
    encoder: EvalEncoder,
    evaluation: EvaluationName,
    scores: Sequence[Score],
    protocol: Mapping[str, Any],
    start: float,
) -> Result:
    """The result of an evaluation that began at `start` (`time.perf_counter()`) and ends now."""
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
        seconds=round(time.perf_counter() - start, 3),
        versions={
            "msf_faiss": msf_faiss.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": sys.version.split()[0],
        },
    )
