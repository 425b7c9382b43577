"""Features that an evaluation computed, kept for the next one: of the same weights, images and view they are the same.

One safetensors file for each question, named by a digest of all that decides the answer: the SHA-256 of the weights and
which of their encoders, the identity of the images, which of them, the view, and the kind of device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from msf_faiss.files import atomic_paths

FOLDER = "features"
"""Of a run's directory."""
_FORMAT = 1  # part of the key: raise it when features would come out otherwise


class Kept(NamedTuple):
    """Embeddings without labels: those come from the data."""

    embeddings: Tensor  # [N, F] float32
    ids: Tensor  # [N] int64, of the images that could be read


class FeatureCache:
    """Features in the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, question: Mapping[str, Any]) -> Path:
        """The file of a question; `name` is for people."""
        text = json.dumps([_FORMAT, question], sort_keys=True)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"

    def get(self, path: Path) -> Kept | None:
        """What the file holds; None if there is none, or none that is whole."""
        try:
            found = safetensors.torch.load_file(path)
            kept = Kept(found["embeddings"], found["ids"])
        except (OSError, KeyError, safetensors.SafetensorError):
            return None
        return kept if len(kept.embeddings) == len(kept.ids) else None

    def put(self, path: Path, kept: Kept) -> None:
        """Keep features; the file appears when it is whole.

        Raises:
            OSError: if it cannot be written.
        """
        with atomic_paths(path) as (temporary,):
            try:
                safetensors.torch.save_file(
                    {"embeddings": kept.embeddings.contiguous(), "ids": kept.ids.contiguous()}, temporary
                )
            except safetensors.SafetensorError as error:
                raise OSError(str(error)) from error


def digest_of(ids: Tensor) -> str:
    """SHA-256 of `ids` [N] int64."""
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().data).hexdigest()
