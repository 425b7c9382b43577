"""Training batches: the online and the target view of each image, in the order of `sampler`.

Shapes: B images, S pixels of a view's side.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from msf_faiss.config import Config, ViewsConfig
from msf_faiss.data.readable import add_unreadable, list_problems
from msf_faiss.data.sampler import FEWEST_IMAGES, BatchStream, Position
from msf_faiss.data.source import Source
from msf_faiss.data.view_maker import Crops, ViewMaker
from msf_faiss.data.workers import load, worker_count
from msf_faiss.device import CPU
from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.errors import UserError
from msf_faiss.views.random_view import ONLINE, TARGET


class Batch(NamedTuple):
    """One training batch. It lacks unreadable images, so B may be less than the batch size."""

    epoch: int
    ids: Tensor  # [B] int64
    online: Crops
    target: Crops
    unreadable: dict[int, str]  # by id, the problems of the images that were left out

    def to(self, device: torch.device) -> Batch:
        """The tensors on `device`, without waiting for it if they lie in pinned memory."""
        return self._replace(
            ids=self.ids.to(device, non_blocking=True),
            online=self.online.to(device),
            target=self.target.to(device),
        )

    def views(self, config: ViewsConfig) -> tuple[Tensor, Tensor]:
        """The online and the target views, normalized float32 [B, 3, S, S] each, on the batch's device."""
        return self.online.augment(config), self.target.augment(config)


def training_batches(
    source: Source,
    config: Config,
    *,
    device: torch.device = CPU,
    start_step: int = 0,
    ranks: Ranks = ALONE,
    unreadable: dict[int, str] | None = None,
) -> Generator[Batch, None, None]:
    """Endless batches from `start_step` on, on the CPU (in pinned memory for a CUDA device).

    Images and views of a batch depend only on the config and the step. Closing the generator ends the workers.

    Args:
        source: the training images.
        config: of the run.
        device: where the batches go; a CUDA device augments the views itself.
        start_step: number of completed steps.
        ranks: to yield only this rank's part of each batch.
        unreadable: problems of images already known to be unreadable, by id; updated with those of each batch.

    Raises:
        UserError: if the images do not fill a batch; if an image is unreadable, or with `unreadable: skip` more than
            the limit or all but one of a batch; if a worker process dies.
    """
    stream = BatchStream(
        len(source), config.train.batch_size, seed=config.seed, start_step=start_step, share=ranks.slice_of
    )
    kinds = {"weak": config.views.weak, "strong": config.views.strong}
    views = {ONLINE: kinds[config.views.online], TARGET: kinds[config.views.target]}
    make = ViewMaker(source, config, views, device)
    unreadable = {} if unreadable is None else unreadable
    workers = worker_count(source, config, device, processes=ranks.local_size)
    for batch in load(partial(_make_batch, make), stream, workers=workers, pin_memory=device.type == "cuda"):
        add_unreadable(unreadable, batch.unreadable, config.data)
        if len(batch.ids) < FEWEST_IMAGES:
            raise UserError(
                f"only {len(batch.ids)} of the {len(batch.ids) + len(batch.unreadable)} images of a batch can be read,"
                f" too few to train on; repair the others, or raise train.batch_size:{list_problems(batch.unreadable)}"
            )
        yield batch


def _make_batch(make: ViewMaker, position: Position) -> Batch:
    ids, views, unreadable = make(position.ids, position.epoch)
    return Batch(position.epoch, torch.from_numpy(ids), views[ONLINE], views[TARGET], unreadable)
