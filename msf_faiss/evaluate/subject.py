"""What is evaluated: the encoders that a checkpoint gives, and the images to judge them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from msf_faiss.bank.faiss_setup import set_threads
from msf_faiss.checkpoint import Checkpoint, find_checkpoint
from msf_faiss.config import Config
from msf_faiss.config_file import override_config
from msf_faiss.data.base import Source
from msf_faiss.data.sources import open_source
from msf_faiss.errors import UserError
from msf_faiss.evaluate.inputs import has_held_out
from msf_faiss.evaluate.results import EncoderName
from msf_faiss.models import build_model
from msf_faiss.restore import load_model

_SETTABLE = ("data.", "views.", "train.threads=")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A checkpoint and the images that judge it."""

    checkpoint: Checkpoint
    config: Config  # the checkpoint's, with other data or views where asked
    device: torch.device
    train: Source
    test: Source | None  # None: there are no held-out images

    def encoder(self, name: EncoderName) -> nn.Module:
        """[B, 3, S, S] normalised views -> [B, F] on the device, frozen, in eval mode.

        Raises:
            UserError: if the checkpoint's weights are damaged, or do not fit its config one by one.
        """
        match name:
            case "pixels":
                encoder: nn.Module = nn.Flatten()
            case "untrained":
                encoder = build_model(self.checkpoint.config.model, seed=self.checkpoint.config.seed).online.backbone
            case "online":
                encoder = load_model(self.checkpoint, torch.device("cpu")).online.backbone
            case "target":
                encoder = load_model(self.checkpoint, torch.device("cpu")).target.backbone
        return encoder.to(self.device).requires_grad_(False).eval()


def open_subject(path: Path, overrides: Sequence[str], device: torch.device) -> Subject:
    """Open a run's newest checkpoint, or a checkpoint, and its data; torch and FAISS get the config's threads.

    Args:
        path: run or checkpoint directory.
        overrides: `data.key=value`, `views.key=value` or `train.threads=n`, changes to the checkpoint's config.
        device: where its encoders compute.

    Raises:
        UserError: if the checkpoint or the data cannot be used, or an override touches anything else.
    """
    checkpoint = find_checkpoint(path)
    for override in overrides:
        if not override.startswith(_SETTABLE):
            raise UserError(
                f"--set {override}: an evaluation takes the encoder as it was trained; only data.…, views.… and "
                "train.threads can be set"
            )
    config = override_config(checkpoint.config, overrides)
    if config.train.threads is not None:
        set_threads(config.train.threads)
    # Batches are pinned for the device of the config, which is the one asked for here.
    config = config.model_copy(update={"train": config.train.model_copy(update={"device": device.type})})
    train = open_source(config.data, "train")
    assert train is not None, "every config names training data"
    test = open_source(config.data, "test") if has_held_out(config.data) else None
    return Subject(checkpoint=checkpoint, config=config, device=device, train=train, test=test)
