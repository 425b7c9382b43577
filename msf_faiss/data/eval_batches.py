"""Batches for the evaluations: chosen images once each, in order, under their centre view or a random one.

Shapes: N images, B of a batch, S pixels of a view's side.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.config import Config, ViewsConfig, WeakView
from msf_faiss.data.source import Source
from msf_faiss.data.train_batches import Crops, ViewMaker, decode_readable, note_unreadable, uses_cuda, worker_count
from msf_faiss.data.workers import load
from msf_faiss.errors import UserError
from msf_faiss.views.random_view import EVAL, center_crop, normalize


class EvalBatch(NamedTuple):
    """Views of some images; unreadable ones are missing."""

    ids: NDArray[np.int64]  # [B]
    crops: Crops | Tensor  # a random view to be augmented, or the centre view [B, 3, S, S] uint8
    unreadable: dict[int, str]  # by id, what is wrong with those that were left out

    def views(self, device: torch.device, config: ViewsConfig) -> Tensor:
        """float32 [B, 3, S, S], normalised, on `device`."""
        if isinstance(self.crops, Tensor):
            return normalize(self.crops.to(device, non_blocking=True), config)
        return self.crops.to(device).augment(config)


def eval_batches(
    source: Source,
    ids: NDArray[np.int64],
    *,
    config: Config,
    batch_size: int,
    view: WeakView | None = None,
    epoch: int = 0,
) -> Generator[EvalBatch, None, None]:
    """Batches of the images `ids` [N] in their order; a batch without any readable image is left out.

    `view`: None for the centre view, or a random one, which follows from the config's seed, `epoch` and the id. Closing
    the iterator ends the worker processes.

    Raises:
        UserError: if an image is unreadable; with `unreadable: skip`, if more than the limit are, or all.
    """
    chunks = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    # Two processes for three batches: one that has a single batch to do would only start and end.
    workers = min(worker_count(source, config), len(chunks) // 2)
    maker = _EvalBatchMaker(source, config, view, epoch)
    unreadable: dict[int, str] = {}
    for batch in load(maker, chunks, workers=workers, pin_memory=uses_cuda(config)):
        note_unreadable(unreadable, batch.unreadable, config.data)
        if len(batch.ids):
            yield batch
    if 0 < len(ids) == len(unreadable):
        raise UserError(
            f"none of the {len(ids)} images can be read, the first of them: {next(iter(unreadable.values()))}"
        )


class _EvalBatchMaker:
    """Makes the batch of some ids; pickled into the workers."""

    def __init__(self, source: Source, config: Config, view: WeakView | None, epoch: int) -> None:
        self._source, self._config, self._epoch = source, config, epoch
        self._make = None if view is None else ViewMaker(source, config, {EVAL: view})

    def __call__(self, ids: NDArray[np.int64]) -> EvalBatch:
        if self._make is None:
            ids, images, unreadable = decode_readable(self._source, ids, self._config.data)
            return EvalBatch(ids, center_crop(images, self._config.views), unreadable)
        ids, views, unreadable = self._make(ids, self._epoch)
        return EvalBatch(ids, views[EVAL], unreadable)
