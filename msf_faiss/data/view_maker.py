"""Random views of images: decode, draw, crop and, if a CPU trains, augment. Runs in the worker processes.

Shapes: B images, S pixels of a view's side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from msf_faiss.config import Config, ViewsConfig, WeakView
from msf_faiss.data.readable import decode_readable
from msf_faiss.data.source import Source
from msf_faiss.device import CPU
from msf_faiss.views.random_view import ViewParameters, augment, augment_uint8_, crop, draw, normalize, shrink

_REDUCTIONS = (8, 4, 2)  # factors by which a JPEG decoder can reduce an image


class Crops(NamedTuple):
    """One view of each image of a batch, as the workers deliver it."""

    pixels: Tensor  # [B, 3, S, S] uint8, channels-last
    parameters: ViewParameters | None  # what `augment` still has to do; None: only normalize

    def to(self, device: torch.device) -> Crops:
        """The tensors on `device`, without waiting for it if they lie in pinned memory."""
        parameters = None if self.parameters is None else self.parameters.to(device)
        return Crops(self.pixels.to(device, non_blocking=True), parameters)

    def augment(self, config: ViewsConfig) -> Tensor:
        """The normalized views, float32 [B, 3, S, S], on the crops' device; channels-last on a CPU."""
        if self.parameters is None:
            return normalize(self.pixels, config)
        return augment(self.pixels, self.parameters, config)


class ViewMaker:
    """Makes random views of images: fully augmented for a CPU, only cropped for CUDA. Picklable."""

    def __init__(
        self, source: Source, config: Config, views: Mapping[int, WeakView], device: torch.device = CPU
    ) -> None:
        """`views`: by stream, the kinds of view to make of each image."""
        self._source, self._data, self._views = source, config.data, views
        self._seed, self._size = config.seed, config.views.size
        self._for_gpu = device.type == "cuda"

    def __call__(
        self, ids: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int64], dict[int, Crops], dict[int, str]]:
        """The ids of the readable images, their views by stream, and the problems of the unreadable ones by id.

        Raises:
            UnreadableImageError: with `unreadable: error`, for the first unreadable image.
        """

        def draw_views(ids: ArrayLike, sizes: NDArray[np.int64]) -> dict[int, ViewParameters]:
            common: Any = {"seed": self._seed, "epoch": epoch, "ids": ids, "sizes": sizes}
            return {stream: draw(view, stream=stream, **common) for stream, view in self._views.items()}

        def draw_boxes(index: int, size: tuple[int, int]) -> list[list[int]]:
            return [one.boxes[0].tolist() for one in draw_views([index], np.array([size])).values()]

        reduction = Reduction(draw_boxes, self._size)
        ids, images, unreadable = decode_readable(self._source, ids, self._data, reduction)
        full = [
            reduction.reduced.get(index, (*image.shape[1:], 1))
            for index, image in zip(ids.tolist(), images, strict=True)
        ]
        sizes, factors = np.array(full, np.int64).reshape(-1, 3)[:, :2], torch.tensor([each[2] for each in full])
        views = {}
        for stream, parameters in draw_views(ids, sizes).items():
            crops = crop(images, shrink(parameters.boxes, factors), self._size)
            if not self._for_gpu:
                augment_uint8_(crops, parameters)
            views[stream] = Crops(crops, parameters if self._for_gpu else None)
        return ids, views, unreadable


class Reduction:
    """Reduces an image as far as all its crops still have at least the pixels of a view (see `decode_readable`)."""

    def __init__(self, draw_boxes: Callable[[int, tuple[int, int]], list[list[int]]], size: int) -> None:
        """`draw_boxes`: from an id and a full (height, width) to the crop boxes of all views; `size`: S."""
        self._draw_boxes, self._size = draw_boxes, size
        self.reduced: dict[int, tuple[int, int, int]] = {}
        """By id: full height, full width and factor of the images that were reduced."""

    def __call__(self, index: int, height: int, width: int) -> int:
        if min(height, width) < 2 * self._size:
            return 1
        shortest = min(min(box[2:]) for box in self._draw_boxes(index, (height, width)))
        factor = next((factor for factor in _REDUCTIONS if shortest >= factor * self._size), 1)
        if factor > 1:
            self.reduced[index] = height, width, factor
        return factor
