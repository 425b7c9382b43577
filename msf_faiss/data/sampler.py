"""The order of the training images: a pure function of (seed, epoch), so that a run can resume at any step."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from msf_faiss.counter_rng import hash_counters
from msf_faiss.errors import UserError

FEWEST_IMAGES = 2
"""Images that each rank needs in each batch: batch statistics of a single one are undefined."""

_ORDER = 0  # stream of random numbers; those of views begin at 1


class Position(NamedTuple):
    """A batch of the stream."""

    epoch: int
    batch: int  # number in its epoch
    ids: NDArray[np.int64]  # [B]


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The ids 0..count-1 in the random order of an epoch."""
    return np.argsort(hash_counters(seed, epoch, _ORDER, np.arange(count)), kind="stable")


def steps_per_epoch(images: int, batch_size: int, *, ranks: int = 1) -> int:
    """Number of whole batches in an epoch; each epoch leaves out other images.

    Raises:
        UserError: if the images do not fill one batch, or the batch is too small for so many ranks.
    """
    if batch_size < FEWEST_IMAGES * ranks:
        raise UserError(
            f"train.batch_size={batch_size} is too small for {ranks} ranks: each needs at least {FEWEST_IMAGES} images;"
            f" set train.batch_size to {FEWEST_IMAGES * ranks} or more, or start fewer ranks"
        )
    if images < batch_size:
        raise UserError(
            f"{images} training images do not fill a batch of {batch_size};"
            f" set train.batch_size to {images} or less, or use more images"
        )
    return images // batch_size


class BatchStream:
    """Endless batches of ids, epoch after epoch, after `start_step` completed steps.

    `share`: from a batch size to the slice of the batch that this rank gets; the whole batch by default.
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
