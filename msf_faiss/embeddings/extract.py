"""Embeddings of a data set under the evaluations' centre view.

Shapes: N images, B of a batch, S pixels of a view's side, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from msf_faiss.config import Config
from msf_faiss.data.eval_batches import eval_batches
from msf_faiss.data.source import Source


class Features(NamedTuple):
    """Embeddings of images, in the order of the ids asked for; unreadable ones that were skipped are missing."""

    embeddings: Tensor  # [N, F] float32 on the CPU, as the encoder gives them, not normalised
    labels: Tensor | None  # [N] int64, -1 where there is none; None for an unlabelled data set
    ids: Tensor  # [N] int64


def extract(
    encoder: nn.Module,
    source: Source,
    *,
    config: Config,
    device: torch.device,
    ids: Tensor | None = None,
    batch_size: int = 256,
) -> Features:
    """Outputs of `encoder` ([B, 3, S, S] on `device` to [B, F]) for the images `ids` [N] (None: all of them).

    In eval mode, float32 and without gradients; afterwards every part of the encoder is in the mode in which it was.

    Raises:
        UserError: if an image is unreadable; with `unreadable: skip`, if more than the limit are, or all.
    """
    parts = list(stream(encoder, source, config=config, device=device, ids=ids, batch_size=batch_size))
    labels = None if source.labels is None else torch.cat([part.labels for part in parts if part.labels is not None])
    return Features(torch.cat([part.embeddings for part in parts]), labels, torch.cat([part.ids for part in parts]))


def stream(
    encoder: nn.Module,
    source: Source,
    *,
    config: Config,
    device: torch.device,
    ids: Tensor | None = None,
    batch_size: int = 256,
) -> Iterator[Features]:
    """What `extract` finds, a batch at a time, so that memory need not hold all of it.

    The encoder is in eval mode until the last batch; closing the iterator ends the worker processes.

    Raises:
        UserError: as `extract` does.
    """
    chosen = np.arange(len(source)) if ids is None else ids.cpu().numpy()
    with _evaluating(encoder):
        for batch in eval_batches(source, chosen, config=config, device=device, batch_size=batch_size):
            with torch.no_grad():  # not around the yield: it would hold for the caller too
                embeddings = encoder(batch.views(device, config.views)).to("cpu", torch.float32)
            labels = None if source.labels is None else torch.from_numpy(source.labels[batch.ids])
            yield Features(embeddings, labels, torch.from_numpy(batch.ids))


@contextmanager
def _evaluating(encoder: nn.Module) -> Iterator[None]:
    """Eval mode for a while; then each part is as it was, frozen ones included."""
    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
