"""What is inspected: a checkpoint's encoder, the training images, and what of them is searched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from msf_faiss.bank import Bank, FlatBank
from msf_faiss.checkpoint.format import Checkpoint
from msf_faiss.checkpoint.load import load_bank, load_model
from msf_faiss.config import Config
from msf_faiss.config.load import override_config
from msf_faiss.data.eval_batches import eval_batches
from msf_faiss.data.source import Source
from msf_faiss.data.sources.open import open_source
from msf_faiss.embeddings.extract import extract
from msf_faiss.errors import UserError
from msf_faiss.models import MeanShift
from msf_faiss.text import printable
from msf_faiss.views.random_view import normalize

_EMBEDDED = 256  # images embedded at a time
_DECODED = 32  # images decoded at a time by each process: photographs may have 50 MB each
_THUMBNAIL = 192  # largest side of a thumbnail


class Subject:
    """A checkpoint over the images of its training; model and bank are loaded when they are first asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        source: Source,
        searched: Literal["bank", "dataset"],
        device: torch.device,
    ) -> None:
        if searched == "bank" and len(source) != checkpoint.dataset_size:
            raise UserError(
                f"{checkpoint.path}: its bank refers to a training set of {checkpoint.dataset_size:,} images by their "
                f"number, but the data now hold {len(source):,}, so that the numbers mean other images; give the data "
                "of the training (--set data.…), or search the present ones with --source dataset"
            )
        self.checkpoint = checkpoint
        self.config = config  # the checkpoint's, with other data or views where asked
        self.source = source
        self.searched = searched
        self.device = device

    def at(self, checkpoint: Checkpoint) -> Subject:
        """The same images and views at another checkpoint of the run."""
        return Subject(checkpoint, self.config, self.source, self.searched, self.device)

    @cached_property
    def model(self) -> MeanShift:
        """In eval mode, on the device."""
        return load_model(self.checkpoint, self.device).eval()

    @cached_property
    def bank(self) -> Bank:
        """The checkpoint's, or one of every readable training image, embedded now.

        Raises:
            UserError: if it is empty or cannot be had.
        """
        if self.searched == "dataset":
            features = extract(self.model.target, self.source, config=self.config, device=self.device)
            embeddings = self._finite(F.normalize(features.embeddings.to(self.device), dim=1))
            everything = FlatBank(len(embeddings), embeddings.shape[1], device=self.device)
            everything.push(embeddings, features.ids.to(self.device))
            return everything
        bank = load_bank(self.checkpoint, self.device)
        if len(bank) == 0:
            raise UserError(
                f"{self.checkpoint.path}: the bank of step {self.checkpoint.step} is empty; inspect a later "
                "checkpoint, or search the training images with --source dataset"
            )
        return bank

    @cached_property
    def entries(self) -> NDArray[np.int64]:
        """[n] images of the bank's entries, by slot."""
        ids: NDArray[np.int64] = self.bank.ids(torch.arange(len(self.bank), device=self.device)).cpu().numpy()
        return ids

    def searchable(self) -> Tensor:
        """[n] slots that a search can find, the oldest first."""
        oldest = self.checkpoint.config.bank.max_age if self.searched == "bank" else None
        return self.bank.newest(len(self.bank) if oldest is None else oldest + 1)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """[N] class of each training image, -1 where it has none."""
        if self.source.labels is None or self.source.classes is None:
            return np.full(len(self.source), -1, np.int64)
        return self.source.labels

    @cached_property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, for people."""
        if self.source.labels is None or self.source.classes is None:
            return None
        return tuple(printable(name) for name in self.source.classes)

    def embed(self, crops: Tensor) -> Tensor:
        """Centre views uint8 [B, 3, S, S] to unit vectors [B, D] on the device, by the target encoder."""
        parts = [normalize(part.to(self.device), self.config.views) for part in torch.split(crops, _EMBEDDED)]
        return self._finite(torch.cat([self.model.embed_target(part) for part in parts]))

    def _finite(self, embeddings: Tensor) -> Tensor:
        if not embeddings.isfinite().all():
            raise UserError(
                f"{self.checkpoint.path}: the target encoder gives embeddings that are not finite; inspect an earlier "
                "checkpoint"
            )
        return embeddings

    def crops(self, ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Centre views uint8 [B, 3, S, S] of training images, some at a time; unreadable ones may be skipped.

        Raises:
            UserError: if an image is unreadable; with `unreadable: skip`, if more than the limit are, or all.
        """
        for batch in eval_batches(self.source, ids, config=self.config, device=self.device, batch_size=_DECODED):
            yield batch.ids, batch.crops.pixels


def open_subject(
    checkpoint: Checkpoint,
    *,
    searched: Literal["bank", "dataset"],
    overrides: Sequence[str] = (),
    device: torch.device | None = None,
) -> Subject:
    """Open a checkpoint and its data.

    Raises:
        UserError: if the data cannot be read, the bank belongs to others, or an override touches anything else.
    """
    for override in overrides:
        if not override.startswith(("data.", "views.")):
            raise UserError(
                f"--set {override}: encoder and bank are taken as they are saved; only data.… and views.… can be set"
            )
    device = device or torch.device("cpu")
    config = override_config(checkpoint.config, overrides)
    source = open_source(config.data, "train")
    assert source is not None, "every config names training data"
    return Subject(checkpoint, config, source, searched, device)


def thumbnail(crop: Tensor) -> Image.Image:
    """What the encoder saw, uint8 [3, S, S], made smaller where it is large."""
    image = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
    side = min(image.width, _THUMBNAIL)
    return image if side == image.width else image.resize((side, side), Image.Resampling.LANCZOS)
