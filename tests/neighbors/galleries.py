"""Galleries without a checkpoint: vectors and labels."""

from types import SimpleNamespace

import torch
from torch import Tensor

from msf_faiss.bank import FlatBank, RingSpec
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.neighbors.gallery import Gallery


def unit(rows: int, dim: int, seed: int) -> Tensor:
    vectors = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def make_gallery(
    images: int,
    ids: list[int],
    *,
    labels: list[int] | None = None,
    classes: int = 3,
    searched: str = "bank",
    vectors: Tensor | None = None,
    max_age: int | None = None,
) -> Gallery:
    """A bank of random entries of the images `ids`, pushed in this order, or of `vectors`."""
    names = None if labels is None else [f"class {label}" for label in range(classes)]
    source = MemorySource(torch.zeros(images, 3, 8, 8, dtype=torch.uint8), labels, names, title="set")
    bank = FlatBank(RingSpec(len(ids), 8 if vectors is None else vectors.shape[1], max_age=max_age))
    bank.push(unit(len(ids), 8, seed=len(ids)) if vectors is None else vectors, torch.tensor(ids))
    config = SimpleNamespace(bank=SimpleNamespace(max_age=max_age))
    checkpoint = SimpleNamespace(dataset_size=images, config=config)
    gallery = Gallery(checkpoint, SimpleNamespace(), source, searched, torch.device("cpu"))
    gallery.bank = bank
    return gallery
