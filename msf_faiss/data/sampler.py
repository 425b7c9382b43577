"""The order in which a run sees its images: a pure function of (seed, epoch), so that it can start anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from msf_faiss.counter_rng import hash_counters
from msf_faiss.errors import UserError

_ORDER = 0  # this module's stream of random numbers; the views' begin at 1


class Position(NamedTuple):
    """One batch of the stream."""

    epoch: int
    batch: int  # its place in the epoch
    ids: NDArray[np.int64]  # [B]


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The ids 0..count-1 in the random order of an epoch."""
    return np.argsort(hash_counters(seed, epoch, _ORDER, np.arange(count)), kind="stable")


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in an epoch; the images that are left over differ from epoch to epoch.

    Raises:
        UserError: if the images do not fill one batch.
    """
    if images < batch_size:
        raise UserError(
            f"{images} training images do not fill a batch of {batch_size};"
            f" set train.batch_size to {images} or less, or use more images"
        )
    return images // batch_size


class BatchStream:
    """The batches of all epochs from a given step on, without end.

    Args:
        images: size of the data set.
        batch_size: images of a whole batch.
        seed: of the order.
        start_step: finished steps.
        share: which of so many images are this rank's; all of them by default.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        share: Callable[[int], slice] = slice,
    ) -> None:
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._start_step, self._share = start_step, share(batch_size)
        self._steps = steps_per_epoch(images, batch_size)

    def __iter__(self) -> Iterator[Position]:
        epoch, first = divmod(self._start_step, self._steps)
        while True:
            order = epoch_order(self._images, self._seed, epoch)
            for batch in range(first, self._steps):
                whole = order[batch * self._batch_size : (batch + 1) * self._batch_size]
                yield Position(epoch, batch, whole[self._share])
            epoch, first = epoch + 1, 0
