"""Evaluation batches: the given images in the given order, as center views or random ones.

Shapes: N images, B images of a batch, S pixels of a view's side.
"""

from collections.abc import Generator
from functools import partial
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

    With `view`, random views, drawn from the config's seed, `epoch` and the id; without, center views. Random views for
    a GPU `device` are augmented there. Closing the generator ends the workers.

    Raises:
        UserError: if an image is unreadable; with `unreadable: skip`, if more than the limit are, or all.
    """
    chunks = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    # A worker for a single batch would take longer to start than to work.
    workers = min(worker_count(source, config, device), len(chunks) // 2)
    work = partial(_center_views, source, config)
    if view is not None:
        work = partial(_random_views, ViewMaker(source, config, {EVAL: view}, device), epoch)
    unreadable: dict[int, str] = {}
    for batch in load(work, chunks, workers=workers, pin_memory=device.type == "cuda"):
        add_unreadable(unreadable, batch.unreadable, config.data)
        if len(batch.ids):
            yield batch
    if 0 < len(ids) == len(unreadable):
        raise UserError(f"none of the {len(ids)} images can be read; the first: {next(iter(unreadable.values()))}")


def _center_views(source: Source, config: Config, ids: NDArray[np.int64]) -> EvalBatch:
    ids, images, unreadable = decode_readable(source, ids, config.data)
    return EvalBatch(ids, Crops(center_crop(images, config.views), None), unreadable)


def _random_views(make: ViewMaker, epoch: int, ids: NDArray[np.int64]) -> EvalBatch:
    ids, views, unreadable = make(ids, epoch)
    return EvalBatch(ids, views[EVAL], unreadable)
