"""What an evaluation works on: labelled images, held-out ones that are not the training images, finite features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from msf_faiss.config import Config, DataConfig, FolderData, HuggingFaceData, ParquetData, WebDatasetData
from msf_faiss.counter_rng import hash_counters
from msf_faiss.data.source import Source
from msf_faiss.embeddings.extract import Features, extract
from msf_faiss.errors import UserError

_SAMPLE = 4  # this module's stream of random numbers; the views' are 1 to 3, the sampler's is 0


def has_held_out(config: DataConfig) -> bool:
    """Whether the config names held-out images other than the training images."""
    if isinstance(config, HuggingFaceData):
        return config.test_split not in (None, config.split)
    if isinstance(config, FolderData | ParquetData | WebDatasetData):
        return config.test_path is not None and config.test_path.resolve() != config.path.resolve()
    return True


def is_labelled(source: Source) -> bool:
    """Whether any image has a label."""
    return source.labels is not None and bool((source.labels >= 0).any())


def labelled_ids(source: Source) -> Tensor:
    """Ids [N] int64 of the images that have a label, rising.

    Raises:
        UserError: if none has.
    """
    if source.labels is None or not is_labelled(source):
        raise UserError(
            f"the data have no labels (an image is {source.name(0)}), and evaluations compare classes; name labelled "
            "data, e.g. --set data.kind=folder --set data.path=FOLDER with a subfolder for each class"
        )
    return torch.from_numpy(np.flatnonzero(source.labels >= 0))


def sample(ids: Tensor, limit: int | None, *, seed: int) -> Tensor:
    """At most `limit` of the `ids` [N], rising; which ones follows from the seed and the ids alone."""
    if limit is None or len(ids) <= limit:
        return ids
    order = np.argsort(hash_counters(seed, 0, _SAMPLE, ids.numpy()), kind="stable")
    return ids[torch.from_numpy(np.sort(order[:limit]))]


def finite_features(
    encoder: nn.Module, source: Source, ids: Tensor, *, config: Config, device: torch.device, batch_size: int
) -> Features:
    """Centre-view features of the images `ids` (see `features.extract`).

    Raises:
        UserError: if an image is unreadable, or a feature is infinite or not a number.
    """
    features = extract(encoder, source, config=config, device=device, ids=ids, batch_size=batch_size)
    broken = ~features.embeddings.isfinite().all(dim=1)
    if broken.any():
        raise UserError(
            f"the encoder's features of {int(broken.sum()):,} of {len(broken):,} images are not finite (one is "
            f"{source.name(int(features.ids[broken][0]))}): training has diverged; evaluate an earlier checkpoint, or "
            "train with a lower optimizer.learning_rate"
        )
    return features
