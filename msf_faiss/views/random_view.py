"""Random augmentations of an image (MSF, ICCV 2021, section 4) and the centre view of evaluations.

`draw` makes every random choice, as a pure function of (seed, epoch, id, stream): a view does not depend on the number
of workers or on the other images of its batch. `crop` runs in the worker that decoded the image. Flip, colors and blur
follow from the same parameters in one of two ways: on a GPU `augment` handles a whole batch in float32; on a CPU
`augment_uint8_` handles one image at a time in the worker, since a batch of floats would leave the cache between two
operations.

Shapes: B images; H, W pixels of an image; S pixels of a view's side; A active jitter operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from msf_faiss.config import StrongView, ViewsConfig, WeakView
from msf_faiss.counter_rng import uniform
from msf_faiss.views import opencv_ops as pixels
from msf_faiss.views.tensor_ops import blend_, blur_, gray_, shift_hue_

__all__ = [
    "EVAL",
    "ONLINE",
    "TARGET",
    "ViewParameters",
    "augment",
    "augment_uint8_",
    "center_crop",
    "crop",
    "draw",
    "normalize",
    "shrink",
]

ONLINE, TARGET, EVAL = 1, 2, 3
"""Streams of random numbers: one for each random view of an image, so that views of one epoch are independent."""

_TRIES = 10
_RATIOS = (3 / 4, 4 / 3)  # width to height
_DRAWS_WEAK = 2 * _TRIES + 3
_DRAWS_STRONG = _DRAWS_WEAK + 12
_HUE = 3  # after brightness, contrast and saturation


class ViewParameters(NamedTuple):
    """What was drawn for the views of a batch."""

    boxes: Tensor  # [B, 4] int64 top, left, height, width in pixels of the image
    flip: Tensor  # [B] bool
    blends: Tensor  # [A, 3, B] float32: factor, share of the mean grey, share of the grey, by position in the order
    rows: Tensor  # [R] int64 rows of the batch: by position those due a hue shift, then the grey, then the blurred
    amounts: Tensor  # [R] float32: turns of the colour wheel, 1, or sigma in pixels
    counts: tuple[int, ...]  # A + 2 lengths of the parts of `rows`; none for a weak view
    largest_sigma: float

    def to(self, device: torch.device) -> ViewParameters:
        """The tensors on `device`, without waiting for it if they lie in pinned memory."""
        boxes, flip, blends, rows, amounts = (tensor.to(device, non_blocking=True) for tensor in self[:5])
        return ViewParameters(boxes, flip, blends, rows, amounts, self.counts, self.largest_sigma)

    def __reduce__(self) -> tuple[Callable[..., ViewParameters], tuple[object, ...]]:
        """Pickle by value: a file handle of shared memory for each small tensor cost a worker's reader 0.2 ms."""
        return _unpickle, (*(tensor.numpy() for tensor in self[:5]), *self[5:])


def _unpickle(*fields: Any) -> ViewParameters:
    boxes, flip, blends, rows, amounts = map(torch.from_numpy, fields[:5])
    return ViewParameters(boxes, flip, blends, rows, amounts, *fields[5:])


def draw(
    view: WeakView | StrongView,
    *,
    seed: int,
    epoch: int,
    ids: ArrayLike,
    stream: int,
    sizes: Sequence[tuple[int, int]] | NDArray[np.int64],
) -> ViewParameters:
    """Parameters of a view of the images `ids` [B], whose `sizes` are [B, 2] (H, W); on the CPU.

    `stream` tells the views of one image and epoch apart (ONLINE, TARGET, or any other integer >= 0).
    """
    strong = isinstance(view, StrongView)
    ids = np.asarray(ids, np.int64)
    numbers = uniform(seed, epoch, stream, ids, count=_DRAWS_STRONG if strong else _DRAWS_WEAK)  # [draws, B]
    boxes = torch.from_numpy(_boxes(view.crop_scale, np.asarray(sizes, np.int64).reshape(-1, 2), numbers))
    flip = torch.from_numpy(numbers[_DRAWS_WEAK - 1] < view.flip)
    if not isinstance(view, StrongView):
        none = torch.empty(0)
        return ViewParameters(boxes, flip, torch.empty(0, 3, len(ids)), none.long(), none, (), 0.0)
    jitter, grayscale, blur, sigma = numbers[_DRAWS_WEAK : _DRAWS_WEAK + 4]
    order, factors = numbers[_DRAWS_WEAK + 4 :].reshape(2, 4, -1)
    blends, parts = _jitter(view, jitter < view.jitter, order, factors)
    low, high = view.blur_sigma
    parts.append((np.flatnonzero(grayscale < view.grayscale), np.ones(len(ids))))
    parts.append((np.flatnonzero(blur < view.blur), low + (high - low) * sigma))
    return ViewParameters(
        boxes,
        flip,
        blends,
        torch.from_numpy(np.concatenate([rows for rows, _ in parts])),
        torch.from_numpy(np.concatenate([amounts[rows] for rows, amounts in parts]).astype(np.float32)),
        tuple(len(rows) for rows, _ in parts),
        high,
    )


def crop(images: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
    """The crops `boxes` [B, 4] of uint8 images [3, H, W], resized bilinearly with antialiasing: uint8 [B, 3, S, S] in
    channels-last layout.

    One by one: the kernels for 8 bits are quicker than matrix products over a batch, and a crop's bits then depend on
    its image and box alone.
    """
    crops = torch.empty(len(images), 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)
    interleaved = crops.permute(0, 2, 3, 1).numpy()  # [B, S, S, 3]
    for row, (image, (top, left, height, width)) in enumerate(zip(images, boxes.tolist(), strict=True)):
        part = image[:, top : top + height, left : left + width]
        if height <= size and width <= size:  # nothing to be antialiased, so that OpenCV's quicker kernel does
            cv2.resize(part.permute(1, 2, 0).numpy(), (size, size), dst=interleaved[row])
        else:
            crops[row] = _resize(part, (size, size))
    return crops


def shrink(boxes: Tensor, times: Tensor) -> Tensor:
    """`boxes` [B, 4], to the nearest pixel, as they lie in images that are `times` [B] smaller."""
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    start, end = ((corner.double() / times[:, None]).round().long() for corner in (start, end))
    return torch.cat([start, end - start], 1)


def augment(crops: Tensor, parameters: ViewParameters, config: ViewsConfig) -> Tensor:
    """Flip, jitter, grey, blur and normalise uint8 `crops` [B, 3, S, S]: float32 [B, 3, S, S] on the crops' device.

    The parameters lie on the same device. Never waits for a CUDA device.
    """
    flipped = torch.where(parameters.flip[:, None, None, None], crops.flip(3), crops)
    images = flipped.to(torch.float32, memory_format=torch.contiguous_format).div_(255)  # [B, 3, S, S]
    if counts := parameters.counts:
        parts = zip(parameters.rows.split_with_sizes(counts), parameters.amounts.split_with_sizes(counts), strict=True)
        for factor, mean_share, gray_share in parameters.blends:
            blend_(images, factor, mean_share, gray_share)
            rows, turns = next(parts)
            if len(rows):
                shift_hue_(images, rows, turns)
        rows, _ = next(parts)
        if len(rows):
            gray_(images, rows)
        rows, sigmas = next(parts)
        if len(rows):
            blur_(images, rows, sigmas, parameters.largest_sigma)
    return normalize(images, config)


def augment_uint8_(crops: Tensor, parameters: ViewParameters) -> None:
    """Flip, jitter, grey and blur uint8 `crops` [B, 3, S, S] of the CPU, in channels-last layout, in place."""
    factors, counts = parameters.blends.permute(2, 0, 1).tolist(), parameters.counts
    rows, amounts = parameters.rows.split_with_sizes(counts), parameters.amounts.split_with_sizes(counts)
    by_row = [dict(zip(row.tolist(), amount.tolist(), strict=True)) for row, amount in zip(rows, amounts, strict=True)]
    *hues, grays, blurs = by_row or [{}, {}]
    for row, (image, flip) in enumerate(zip(crops.permute(0, 2, 3, 1).numpy(), parameters.flip.tolist(), strict=True)):
        result = cv2.flip(image, 1) if flip else image  # [S, S, 3]
        for blend, turns in zip(factors[row], hues, strict=True):
            result = pixels.shift_hue(result, turns[row]) if row in turns else pixels.blend(result, *blend)
        if row in grays:
            result = pixels.gray(result)
        if row in blurs:
            result = pixels.blur(result, blurs[row], parameters.largest_sigma)
        if result is not image:
            image[:] = result


def center_crop(images: Sequence[Tensor], config: ViewsConfig) -> Tensor:
    """The view of the evaluations: shorter side resized, centre crop. uint8 [3, H, W] each to uint8 [B, 3, S, S]."""
    size, resize = config.size, config.resize
    views = torch.empty(len(images), 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)
    for row, image in enumerate(images):
        height, width = image.shape[1:]
        shorter = min(height, width)
        if shorter != resize:
            height, width = height * resize // shorter, width * resize // shorter
            image = _resize(image, (height, width))
        top, left = round((height - size) / 2), round((width - size) / 2)
        views[row] = image[:, top : top + size, left : left + size]
    return views


def normalize(images: Tensor, config: ViewsConfig) -> Tensor:
    """Subtract the mean and divide by the deviation: in place where `images` [B, 3, S, S] are float32 in 0..1, and in a
    new tensor where they are uint8, whose layout a CPU keeps."""
    if images.dtype == torch.uint8:
        if images.device.type == "cpu" and images.is_contiguous(memory_format=torch.channels_last):
            return _normalize_interleaved(images.permute(0, 2, 3, 1), config).permute(0, 3, 1, 2)
        images = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        images[:, channel].sub_(mean).div_(std)
    return images


def _normalize_interleaved(images: Tensor, config: ViewsConfig) -> Tensor:
    """uint8 [B, S, S, 3] to float32, in three passes over whole rows."""
    rows = images.flatten(2)  # [B, S, 3S]
    # numpy asks for huge pages, torch does not: faults of small ones cost thrice what the arithmetic does.
    normalized = torch.from_numpy(np.empty(rows.shape, np.float32))
    mean, std = (torch.tensor(values, dtype=torch.float64).mul_(255) for values in (config.mean, config.std))
    repeats = images.shape[2]
    normalized.copy_(rows).sub_(mean.float().repeat(repeats)).mul_((1 / std).float().repeat(repeats))
    return normalized.view(images.shape)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] to uint8 [3, *size], bilinearly with antialiasing."""
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _boxes(scale: tuple[float, float], sizes: NDArray[np.int64], numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """[B, 4] top, left, height, width as torchvision's RandomResizedCrop draws them: ten tries, then a central crop."""
    heights, widths = sizes.T  # [B]
    low, high = scale
    areas = heights * widths * (low + (high - low) * numbers[:_TRIES])  # [tries, B]
    roots = np.exp((math.log(_RATIOS[0]) + math.log(_RATIOS[1] / _RATIOS[0]) * numbers[_TRIES : 2 * _TRIES]) / 2)
    sides = np.sqrt(areas)
    tried_widths, tried_heights = np.rint(sides * roots), np.rint(sides / roots)
    fits = (tried_widths > 0) & (tried_widths <= widths) & (tried_heights > 0) & (tried_heights <= heights)
    first, columns = fits.argmax(0), np.arange(len(sizes))
    found = fits[first, columns]
    central_widths = np.minimum(widths, np.rint(heights * _RATIOS[1]))
    central_heights = np.minimum(heights, np.rint(widths / _RATIOS[0]))
    box_widths = np.where(found, tried_widths[first, columns], central_widths)
    box_heights = np.where(found, tried_heights[first, columns], central_heights)
    spare_height, spare_width = heights - box_heights, widths - box_widths
    down, right = numbers[2 * _TRIES : 2 * _TRIES + 2]
    top = np.where(found, np.floor(down * (spare_height + 1)), spare_height // 2)
    left = np.where(found, np.floor(right * (spare_width + 1)), spare_width // 2)
    return np.stack([top, left, box_heights, box_widths], 1).astype(np.int64)


def _jitter(
    view: StrongView, chosen: NDArray[np.bool_], order: NDArray[np.float64], factors: NDArray[np.float64]
) -> tuple[Tensor, list[tuple[NDArray[np.int64], NDArray[np.float64]]]]:
    """Blends [A, 3, B], and for each position the rows that shift their hue there with all rows' turns."""
    strengths = np.array([view.brightness, view.contrast, view.saturation, view.hue])
    active = np.flatnonzero(strengths)
    # A share x above 1 would make factors negative; the config keeps it within 0..1.
    factors = (2 * factors - 1) * strengths[:, None]  # [4, B]
    turns = factors[_HUE]
    factors = 1 + factors
    due = active[order[active].argsort(0)]  # [A, B] operation at each position
    blends, parts = np.empty((len(due), 3, len(chosen)), np.float32), []
    for position, operation in enumerate(due):
        blending = chosen & (operation != _HUE)
        factor = np.where(blending, factors[operation, np.arange(len(chosen))], 1.0)
        blends[position] = factor, (1 - factor) * (operation == 1), (1 - factor) * (operation == 2)
        parts.append((np.flatnonzero(chosen & (operation == _HUE)), turns))
    return torch.from_numpy(blends), parts
