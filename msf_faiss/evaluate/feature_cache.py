"""Features cached on disk, so that the next evaluation of the same weights, images and view need not compute them.

One safetensors file per key; a key covers all that determines the features (see `features.compute_features`).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from msf_faiss.files import atomic_paths

FOLDER = "features"
"""Name of the cache in a run's directory."""
_FORMAT = 1  # part of every key; raise it when the same key would give other features


class CachedFeatures(NamedTuple):
    """Features without labels, which come from the data."""

    embeddings: Tensor  # [N, F] float32
    ids: Tensor  # [N] int64, of the readable images


class FeatureCache:
    """A folder of cached features."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, key: Mapping[str, Any]) -> Path:
        """The file of a key, which begins with a readable `name`."""
        text = json.dumps([_FORMAT, key], sort_keys=True)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"

    def get(self, path: Path) -> CachedFeatures | None:
        """The features in a file; None if it is missing or damaged."""
        try:
            tensors = safetensors.torch.load_file(path)
            cached = CachedFeatures(tensors["embeddings"], tensors["ids"])
        except (OSError, KeyError, safetensors.SafetensorError):
            return None
        return cached if len(cached.embeddings) == len(cached.ids) else None

    def put(self, path: Path, features: CachedFeatures) -> None:
        """Write features to a file, atomically.

        Raises:
            OSError: if it cannot be written.
        """
        with atomic_paths(path) as (temporary,):
            try:
                safetensors.torch.save_file(
                    {name: tensor.contiguous() for name, tensor in features._asdict().items()}, temporary
                )
            except safetensors.SafetensorError as error:
                raise OSError(str(error)) from error
