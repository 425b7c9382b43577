"""Training batches: two views of each image, made where it was decoded; on a GPU all but the crop is left to it.

Shapes: B images, S pixels of a view's side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from msf_faiss.config import Config, SourceConfig, View, ViewsConfig, WeakView
from msf_faiss.data import sampler
from msf_faiss.data.sampler import BatchStream, Position
from msf_faiss.data.source import Reduce, Source, UnreadableImageError
from msf_faiss.data.workers import load
from msf_faiss.distributed.ranks import Ranks
from msf_faiss.errors import UserError
from msf_faiss.views.random_view import (
    ONLINE,
    TARGET,
    ViewParameters,
    augment,
    augment_uint8_,
    crop,
    draw,
    normalize,
    shrink,
)

_MOST_WORKERS = 16
_WORTH_A_WORKER = 96  # px of a view's side
_LEAST = 2  # images that have batch statistics
_NAMED = 5  # unreadable images that an error lists
_REDUCTIONS = (8, 4, 2)  # how many times smaller a JPEG decoder can make an image


class Crops(NamedTuple):
    """One view of a batch, to be augmented."""

    pixels: Tensor  # [B, 3, S, S] uint8, in channels-last layout
    parameters: ViewParameters | None  # what is still to be done; None: nothing but to normalise

    def to(self, device: torch.device) -> Crops:
        parameters = None if self.parameters is None else self.parameters.to(device)
        return Crops(self.pixels.to(device, non_blocking=True), parameters)

    def augment(self, config: ViewsConfig) -> Tensor:
        """The view, float32 [B, 3, S, S], normalised, on the crops' device; in channels-last layout on a CPU."""
        if self.parameters is None:
            return normalize(self.pixels, config)
        return augment(self.pixels, self.parameters, config)


class Batch(NamedTuple):
    """One training batch. Unreadable images are missing from it, so that B may be less than the batch size."""

    epoch: int
    ids: Tensor  # [B] int64
    online: Crops
    target: Crops
    unreadable: dict[int, str]  # by id, what is wrong with the images of this batch that were left out

    def to(self, device: torch.device) -> Batch:
        """The tensors on `device`; a copy to CUDA does not wait, the batch being in pinned memory."""
        return self._replace(
            ids=self.ids.to(device, non_blocking=True),
            online=self.online.to(device),
            target=self.target.to(device),
        )

    def views(self, config: ViewsConfig) -> tuple[Tensor, Tensor]:
        """The online and the target view, float32 [B, 3, S, S] each, normalised, on the batch's device."""
        return self.online.augment(config), self.target.augment(config)


class Decoded(NamedTuple):
    """Images that could be read, and what is wrong with the others."""

    ids: NDArray[np.int64]  # [B]
    images: list[Tensor]  # B of uint8 [3, H, W]
    unreadable: dict[int, str]


def steps_per_epoch(source: Source, config: Config, ranks: Ranks | None = None) -> int:
    """Batches in an epoch.

    Raises:
        UserError: if the images do not fill one batch, or a batch is too small for its `ranks`.
    """
    if ranks is not None and config.train.batch_size < _LEAST * ranks.size:
        raise UserError(
            f"a batch of {config.train.batch_size} is too small for {ranks.size} ranks, each of which needs {_LEAST}"
            f" images; set train.batch_size to {_LEAST * ranks.size} or more, or start fewer ranks"
        )
    return sampler.steps_per_epoch(len(source), config.train.batch_size)


def training_batches(
    source: Source,
    config: Config,
    *,
    start_step: int = 0,
    ranks: Ranks | None = None,
    unreadable: dict[int, str] | None = None,
) -> Generator[Batch, None, None]:
    """The batches of all epochs from `start_step` on, without end, on the CPU (pinned if there is CUDA).

    Which images a batch holds and how they are cropped follows from the config and the step alone. Closing the iterator
    ends the worker processes.

    Args:
        source: the images.
        config: of the run.
        start_step: finished steps.
        ranks: of each batch, a rank gets its part; None: this process gets all.
        unreadable: images already known to be unreadable, with what is wrong; those of each batch that is handed out
            are added.

    Raises:
        UserError: if the images do not fill a batch; if one is unreadable, or with `unreadable: skip` more than the
            limit, or all but one of a batch; if a worker process dies.
    """
    ranks = ranks or Ranks.alone()
    stream = BatchStream(
        len(source), config.train.batch_size, seed=config.seed, start_step=start_step, share=ranks.slice_of
    )
    maker = _BatchMaker(source, config)
    unreadable = {} if unreadable is None else unreadable
    workers = worker_count(source, config, processes=ranks.local_size)
    for batch in load(maker, stream, workers=workers, pin_memory=uses_cuda(config)):
        note_unreadable(unreadable, batch.unreadable, config.data)
        if len(batch.ids) < _LEAST:
            asked = len(batch.ids) + len(batch.unreadable)
            raise UserError(
                f"only {len(batch.ids)} of a batch of {asked} images can be read, too few to train;"
                f" repair the others, or raise train.batch_size:{_list_some(batch.unreadable)}"
            )
        yield batch


def decode_readable(
    source: Source, ids: NDArray[np.int64], config: SourceConfig, reduce: Reduce | None = None
) -> Decoded:
    """Decode `ids`; with `unreadable: skip`, those that can be read. `reduce`: see `Source.decode`.

    Raises:
        UnreadableImageError: with `unreadable: error`, at the first image that cannot.
    """
    try:
        return Decoded(ids, source.decode(ids.tolist(), reduce), {})
    except UnreadableImageError as error:
        if config.unreadable == "error":
            raise UnreadableImageError(f"{error}; repair or remove it, or set data.unreadable=skip") from error
    images, unreadable = {}, {}
    for index in ids.tolist():
        try:
            images[index] = source.decode([index], reduce)[0]
        except UnreadableImageError as error:
            unreadable[index] = str(error)
    readable = [index for index in ids.tolist() if index in images]
    return Decoded(np.array(readable, np.int64), [images[index] for index in readable], unreadable)


def note_unreadable(known: dict[int, str], new: dict[int, str], config: SourceConfig) -> None:
    """Add `new` unreadable images to those `known`.

    Raises:
        UserError: if they are more than the config's limit.
    """
    known |= new
    if len(known) > config.unreadable_limit:
        raise UserError(
            f"{len(known)} images cannot be read, more than data.unreadable_limit ({config.unreadable_limit}); repair"
            f" or remove them, or raise the limit:{_list_some(known)}"
        )


def worker_count(source: Source, config: Config, *, processes: int = 1) -> int:
    """Processes that make views of `source` for each of so many `processes` on this host."""
    if config.data.workers != "auto":
        return config.data.workers
    # Handing views over costs as much as making them of decoded images. It pays where the main process has a GPU to
    # keep busy, and at small sizes not even there.
    if source.in_memory and not (uses_cuda(config) and config.views.size >= _WORTH_A_WORKER):
        return 0
    # What this process may use, which in a container is less than the machine has; only Linux tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // processes, _MOST_WORKERS))


def uses_cuda(config: Config) -> bool:
    """Whether batches go to a GPU."""
    return config.train.device != "cpu" and torch.cuda.is_available()


class Reduction:
    """Lets decoders make images smaller (`base.Reduce`) where their views would not show it: each view's crop must
    still have as many pixels as the view. Remembers which ones it let."""

    def __init__(self, boxes: Callable[[int, tuple[int, int]], list[list[int]]], size: int) -> None:
        """`boxes`: from an id and a full size to the boxes of all views of the image; `size`: of a view."""
        self._boxes, self._size = boxes, size
        self.reduced: dict[int, tuple[int, int, int]] = {}
        """By id, full height and width and how many times smaller the image is."""

    def __call__(self, index: int, height: int, width: int) -> int:
        if min(height, width) < 2 * self._size:
            return 1
        least = min(min(box[2:]) for box in self._boxes(index, (height, width)))
        times = next((times for times in _REDUCTIONS if least >= times * self._size), 1)
        if times > 1:
            self.reduced[index] = height, width, times
        return times


class ViewMaker:
    """Makes random views of images as the config's training device wants them; pickled into the workers."""

    def __init__(self, source: Source, config: Config, views: Mapping[int, WeakView]) -> None:
        """`views`: those of each image, by stream."""
        self._source, self._data, self._views = source, config.data, views
        self._seed, self._size = config.seed, config.views.size
        self._on_device = uses_cuda(config)  # found out here: no worker is to wake the GPU's driver

    def __call__(
        self, ids: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int64], dict[int, Crops], dict[int, str]]:
        """The ids of those that can be read, their views by stream, and what is wrong with the others.

        Raises:
            UnreadableImageError: with `unreadable: error`, at the first image that cannot be read.
        """

        def drawn(ids: ArrayLike, sizes: NDArray[np.int64]) -> dict[int, ViewParameters]:
            common: Any = {"seed": self._seed, "epoch": epoch, "ids": ids, "sizes": sizes}
            return {stream: draw(view, stream=stream, **common) for stream, view in self._views.items()}

        def boxes(index: int, size: tuple[int, int]) -> list[list[int]]:
            return [one.boxes[0].tolist() for one in drawn([index], np.array([size])).values()]

        reduction = Reduction(boxes, self._size)
        ids, images, unreadable = decode_readable(self._source, ids, self._data, reduction)
        whole = [
            reduction.reduced.get(index, (*image.shape[1:], 1))
            for index, image in zip(ids.tolist(), images, strict=True)
        ]
        sizes, times = np.array(whole, np.int64).reshape(-1, 3)[:, :2], torch.tensor([each[2] for each in whole])
        views = {}
        for stream, parameters in drawn(ids, sizes).items():
            crops = crop(images, shrink(parameters.boxes, times), self._size)
            if not self._on_device:
                augment_uint8_(crops, parameters)
            views[stream] = Crops(crops, parameters if self._on_device else None)
        return ids, views, unreadable


class _BatchMaker:
    """Makes the batch at a position of the stream; pickled into the workers."""

    def __init__(self, source: Source, config: Config) -> None:
        views = config.views
        kinds: dict[View, WeakView] = {"weak": views.weak, "strong": views.strong}
        self._make = ViewMaker(source, config, {ONLINE: kinds[views.online], TARGET: kinds[views.target]})

    def __call__(self, position: Position) -> Batch:
        ids, views, unreadable = self._make(position.ids, position.epoch)
        return Batch(position.epoch, torch.from_numpy(ids), views[ONLINE], views[TARGET], unreadable)


def _list_some(unreadable: dict[int, str]) -> str:
    """The first of the problems, each on a line of its own."""
    lines = list(unreadable.values())
    more = [f"and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
    return "".join(f"\n  {line}" for line in lines[:_NAMED] + more)
