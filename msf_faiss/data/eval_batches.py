"""Evaluation batches: the given images in the given order, as center views or random ones.

Shapes: N images, B images of a batch, S pixels of a view's side.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.config import Config, ViewsConfig, WeakView
from msf_faiss.data.readable import add_unreadable, decode_readable
from msf_faiss.data.source import Source
from msf_faiss.data.view_maker import Crops, ViewMaker
from msf_faiss.data.workers import load, worker_count
from msf_faiss.device import CPU
from msf_faiss.errors import UserError
from msf_faiss.views.random_view import EVAL, center_crop


class EvalBatch(NamedTuple):
    """Views of the readable images of a batch."""

    ids: NDArray[np.int64]  # [B]
    crops: Crops
    unreadable: dict[int, str]  # by id, the problems of the images that were left out

    def views(self, device: torch.device, config: ViewsConfig) -> Tensor:
        """The normalized views, float32 [B, 3, S, S], on `device`."""
        return self.crops.to(device).augment(config)


def eval_batches(
    source: Source,
    ids: NDArray[np.int64],
    *,
    config: Config,
    device: torch.device = CPU,
    batch_size: int,
    view: WeakView | None = None,
    epoch: int = 0,
) -> Generator[EvalBatch, None, None]:
    """Batches of the images `ids` [N], in order, without unreadable images and empty batches.

    Closing the generator ends the workers.

    Args:
        source: the images.
        ids: which of them.
        config: of the run.
        device: where the views go; batches for a GPU are in pinned memory, and random views are augmented there.
        batch_size: images in a batch.
        view: kind of the random views, drawn from the config's seed, `epoch` and the id; None: center views.
        epoch: see `view`.

    Raises:
        UserError: if an image is unreadable; with `unreadable: skip`, if more than the limit are, or all.
    """
    chunks = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    # A worker for a single batch would take longer to start than to work.
    workers = min(worker_count(source, config, device), len(chunks) // 2)
    maker = _EvalBatchMaker(source, config, view, epoch, device)
    unreadable: dict[int, str] = {}
    for batch in load(maker, chunks, workers=workers, pin_memory=device.type == "cuda"):
        add_unreadable(unreadable, batch.unreadable, config.data)
        if len(batch.ids):
            yield batch
    if 0 < len(ids) == len(unreadable):
        raise UserError(f"none of the {len(ids)} images can be read; the first: {next(iter(unreadable.values()))}")


class _EvalBatchMaker:
    """Makes the batch of some ids. Picklable."""

    def __init__(self, source: Source, config: Config, view: WeakView | None, epoch: int, device: torch.device) -> None:
        self._source, self._config, self._epoch = source, config, epoch
        self._make = None if view is None else ViewMaker(source, config, {EVAL: view}, device)

    def __call__(self, ids: NDArray[np.int64]) -> EvalBatch:
        if self._make is None:
            ids, images, unreadable = decode_readable(self._source, ids, self._config.data)
            return EvalBatch(ids, Crops(center_crop(images, self._config.views), None), unreadable)
        ids, views, unreadable = self._make(ids, self._epoch)
        return EvalBatch(ids, views[EVAL], unreadable)
