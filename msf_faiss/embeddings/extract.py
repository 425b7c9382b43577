"""Compute the embeddings of a data set's images under the evaluation view, a centre crop.

Shapes: N images, B of a batch, S pixels of a view's side, F features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from msf_faiss.config import Config, ViewsConfig
from msf_faiss.data.eval_batches import eval_batches
from msf_faiss.data.source import Source
from msf_faiss.errors import UserError
from msf_faiss.text import printable

DIVERGED = "training has diverged; use an earlier checkpoint, or train with a lower optimizer.learning_rate"


def describe_view(views: ViewsConfig) -> dict[str, Any]:
    """The evaluation view, for metadata: shorter side and crop in pixels, and the normalisation."""
    return {"resize": views.resize, "center_crop": views.size, "mean": list(views.mean), "std": list(views.std)}


class Features(NamedTuple):
    """Embeddings of images, in the order of the requested ids; skipped unreadable images are missing."""

    embeddings: Tensor  # [N, F] float32 on the CPU, not normalised
    labels: Tensor | None  # [N] int64, -1 for an image without a label; None for an unlabelled data set
    ids: Tensor  # [N] int64


def extract(
    encoder: nn.Module,
    source: Source,
    *,
    config: Config,
    device: torch.device,
    ids: Tensor | None = None,
    batch_size: int = 256,
    if_not_finite: str = DIVERGED,
) -> Features:
    """Outputs of `encoder` for the images `ids` [N] (None: all), in eval mode, without gradients.

    `encoder` maps [B, 3, S, S] on `device` to [B, F]; each of its modules is then put back into its own mode.
    `if_not_finite` is the end of the error of an embedding that is not finite.

    Raises:
        UserError: if an image is unreadable; with `unreadable: skip`, if more than the limit are, or all; if an
            embedding is not finite.
    """
    parts = list(
        extract_batches(
            encoder,
            source,
            config=config,
            device=device,
            ids=ids,
            batch_size=batch_size,
            if_not_finite=if_not_finite,
        )
    )
    labels = None if source.labels is None else torch.cat([part.labels for part in parts if part.labels is not None])
    return Features(torch.cat([part.embeddings for part in parts]), labels, torch.cat([part.ids for part in parts]))


def extract_batches(
    encoder: nn.Module,
    source: Source,
    *,
    config: Config,
    device: torch.device,
    ids: Tensor | None = None,
    batch_size: int = 256,
    if_not_finite: str = DIVERGED,
) -> Iterator[Features]:
    """The same as `extract`, batch by batch. The encoder is in eval mode until the iterator ends or is closed."""
    chosen = np.arange(len(source)) if ids is None else ids.cpu().numpy()
    with _eval_mode(encoder):
        for batch in eval_batches(source, chosen, config=config, device=device, batch_size=batch_size):
            with torch.no_grad():  # not around the yield, where it would apply to the caller too
                embeddings = encoder(batch.views(device, config.views)).to("cpu", torch.float32)
            finite = embeddings.isfinite().all(dim=1)
            if not finite.all():
                name = source.name(int(batch.ids[~finite.numpy()][0]))
                raise UserError(f"the embedding of {printable(name)} is not finite: {if_not_finite}")
            labels = None if source.labels is None else torch.from_numpy(source.labels[batch.ids])
            yield Features(embeddings, labels, torch.from_numpy(batch.ids))


@contextmanager
def _eval_mode(encoder: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
