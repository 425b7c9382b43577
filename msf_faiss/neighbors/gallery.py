"""The images among which neighbours are searched: a checkpoint's bank, or the whole training set.

Shapes: N training images, n entries of the gallery, B images of a batch, S pixels of a view's side, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from msf_faiss.bank import Bank, FlatBank, RingSpec
from msf_faiss.checkpoint.format import Checkpoint
from msf_faiss.checkpoint.load import load_bank, load_model
from msf_faiss.config import Config
from msf_faiss.data.eval_batches import eval_batches
from msf_faiss.data.source import Source
from msf_faiss.device import CPU
from msf_faiss.embeddings.extract import extract
from msf_faiss.embeddings.inputs import check_bank_images, open_inputs, override_inputs
from msf_faiss.errors import UserError
from msf_faiss.models import MeanShift
from msf_faiss.neighbors.records import Searched
from msf_faiss.text import printable
from msf_faiss.views.random_view import normalize

_EMBED_BATCH = 256  # images
_DECODE_BATCH = 32  # images per process; a decoded photograph may take 50 MB
_THUMBNAIL = 192  # largest side of a thumbnail in pixels


class Gallery:
    """A checkpoint's target encoder, and the embeddings and images searched with it. Loads model and bank lazily."""

    def __init__(
        self, checkpoint: Checkpoint, config: Config, source: Source, searched: Searched, device: torch.device
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config  # the checkpoint's, with overrides of data and views
        self.source = source  # the training images
        self.searched = searched
        self.device = device

    def at(self, checkpoint: Checkpoint) -> Gallery:
        """The gallery of another checkpoint of the run, with the same images and views."""
        return Gallery(checkpoint, self.config, self.source, self.searched, self.device)

    @cached_property
    def model(self) -> MeanShift:
        """The checkpoint's model, in eval mode, on the device."""
        return load_model(self.checkpoint, self.device).eval()

    @cached_property
    def bank(self) -> Bank:
        """The checkpoint's bank, or a bank of all readable training images.

        Raises:
            UserError: if the bank is empty, or cannot be loaded or computed.
        """
        if self.searched == "dataset":
            features = extract(self.model.target, self.source, config=self.config, device=self.device)
            embeddings = F.normalize(features.embeddings.to(self.device), dim=1)
            dataset = FlatBank(RingSpec(len(embeddings), embeddings.shape[1], device=self.device))
            dataset.push(embeddings, features.ids.to(self.device))
            return dataset
        bank = load_bank(self.checkpoint, self.device)
        if len(bank) == 0:
            raise UserError(
                f"{self.checkpoint.path}: the bank is empty at step {self.checkpoint.step}; inspect a later checkpoint,"
                " or search the training images with --source dataset"
            )
        return bank

    @cached_property
    def entry_ids(self) -> NDArray[np.int64]:
        """[n] image id of each entry, by slot."""
        ids: NDArray[np.int64] = self.bank.ids(torch.arange(len(self.bank), device=self.device)).cpu().numpy()
        return ids

    def searchable_slots(self) -> Tensor:
        """Slots of the entries that a search may return, oldest first: at most n."""
        max_age = self.checkpoint.config.bank.max_age if self.searched == "bank" else None
        return self.bank.newest(len(self.bank) if max_age is None else max_age + 1)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """[N] class index of each training image, -1 if it has none."""
        if self.source.labels is None or self.source.classes is None:
            return np.full(len(self.source), -1, np.int64)
        return self.source.labels

    @cached_property
    def classes(self) -> tuple[str, ...] | None:
        """Printable names of the classes; None for an unlabelled data set."""
        if self.source.labels is None or self.source.classes is None:
            return None
        return tuple(printable(name) for name in self.source.classes)

    def embed_views(self, views: Tensor) -> Tensor:
        """Embed centre views uint8 [B, 3, S, S] with the target encoder: unit vectors [B, D] on the device."""
        parts = [normalize(part.to(self.device), self.config.views) for part in torch.split(views, _EMBED_BATCH)]
        embeddings = torch.cat([self.model.embed_target(part) for part in parts])
        if not embeddings.isfinite().all():
            raise UserError(
                f"{self.checkpoint.path}: embeddings of the target encoder are not finite; inspect an earlier "
                "checkpoint"
            )
        return embeddings

    def views(self, ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Batches of ids [B] and centre views uint8 [B, 3, S, S] of training images; skipped unreadable ones missing.

        Raises:
            UserError: if an image is unreadable; with `unreadable: skip`, if more than the limit are, or all.
        """
        for batch in eval_batches(self.source, ids, config=self.config, device=self.device, batch_size=_DECODE_BATCH):
            yield batch.ids, batch.crops.pixels


def open_gallery(
    checkpoint: Checkpoint,
    *,
    searched: Searched,
    overrides: Sequence[str] = (),
    device: torch.device = CPU,
) -> Gallery:
    """Open the training images of a checkpoint, to search them or its bank.

    Raises:
        UserError: if the data cannot be read, the bank refers to other data, or an override changes more than data and
            views.
    """
    config = override_inputs(checkpoint.config, overrides)
    source = open_inputs(config)
    if searched == "bank":
        check_bank_images(checkpoint, source)
    return Gallery(checkpoint, config, source, searched, device)


def thumbnail(view: Tensor) -> Image.Image:
    """A centre view uint8 [3, S, S] as an image of at most 192 pixels a side."""
    image = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
    side = min(image.width, _THUMBNAIL)
    return image if side == image.width else image.resize((side, side), Image.Resampling.LANCZOS)
