"""Which images of a data set an evaluation uses."""

import numpy as np
import torch
from torch import Tensor

from msf_faiss.config import DataConfig, FolderData, HuggingFaceData, ParquetData, WebDatasetData
from msf_faiss.counter_rng import hash_counters
from msf_faiss.data.source import Source
from msf_faiss.data.sources.open import names_held_out
from msf_faiss.errors import UserError

_SAMPLE_STREAM = 4  # of counter_rng; the sampler's is 0, the views' are 1 to 3


def has_held_out(config: DataConfig) -> bool:
    """Whether the config names held-out images other than the training images."""
    if isinstance(config, HuggingFaceData):
        return config.test_split not in (None, config.split)
    if isinstance(config, FolderData | ParquetData | WebDatasetData):
        return names_held_out(config)
    return True


def is_labelled(source: Source) -> bool:
    """Whether any image has a label."""
    return source.labels is not None and bool((source.labels >= 0).any())


def labelled_ids(source: Source) -> Tensor:
    """Ids [N] int64 of the labelled images, ascending.

    Raises:
        UserError: if no image has a label.
    """
    if source.labels is None or not is_labelled(source):
        raise UserError(
            f"the images have no labels (for example {source.name(0)}), and an evaluation needs classes; use labelled "
            "data, e.g. --set data.kind=folder --set data.path=FOLDER with one subfolder per class"
        )
    return torch.from_numpy(np.flatnonzero(source.labels >= 0))


def sample(ids: Tensor, limit: int | None, *, seed: int) -> Tensor:
    """At most `limit` of the `ids` [N], ascending: a random sample that depends only on the seed and the ids."""
    if limit is None or len(ids) <= limit:
        return ids
    order = np.argsort(hash_counters(seed, 0, _SAMPLE_STREAM, ids.numpy()), kind="stable")
    return ids[torch.from_numpy(np.sort(order[:limit]))]
