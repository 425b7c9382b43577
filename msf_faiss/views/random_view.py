"""Random augmentations of an image (MSF, ICCV 2021, section 4) and the center view of evaluations.

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
from msf_faiss.views import opencv_ops
from msf_faiss.views.tensor_ops import blend_, blur_, gray_, shift_hue_

ONLINE, TARGET, EVAL = 1, 2, 3
"""Streams of random numbers, which make the random views of one image and epoch independent."""

_TRIES = 10
_LONGEST = 8  # times its shorter side that an image may be long before its ends are cut off
_RATIOS = (3 / 4, 4 / 3)  # width to height
_DRAWS_WEAK = 2 * _TRIES + 3
_DRAWS_STRONG = _DRAWS_WEAK + 12
_CONTRAST, _SATURATION, _HUE = 1, 2, 3  # jitter operations; 0 is brightness


class RowValues(NamedTuple):
    """The images of a batch to which an operation applies, and its strength for each."""

    rows: Tensor  # [n] int64
    values: Tensor  # [n] float32

    def by_row(self) -> dict[int, float]:
        return dict(zip(self.rows.tolist(), self.values.tolist(), strict=True))


class ViewParameters(NamedTuple):
    """The random choices for one view of each image of a batch."""

    boxes: Tensor  # [B, 4] int64 top, left, height, width in pixels of the image
    flip: Tensor  # [B] bool
    blends: (
        Tensor  # [A, 3, B] float32 weights of the image, its mean gray and its gray, for each position of the jitter
    )
    hue: tuple[RowValues, ...]  # A: at each position, images whose hue is shifted, and by which part of the color wheel
    gray: Tensor  # [n] int64 rows
    blur: RowValues  # standard deviation in pixels of the view
    largest_sigma: float  # that `blur` could have drawn

    def to(self, device: torch.device) -> ViewParameters:
        """The tensors on `device`, without waiting for it if they lie in pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, convert: Callable[[Any], Any]) -> ViewParameters:
        boxes, flip, blends, gray = map(convert, (self.boxes, self.flip, self.blends, self.gray))
        hue = tuple(RowValues(*map(convert, each)) for each in self.hue)
        return ViewParameters(boxes, flip, blends, hue, gray, RowValues(*map(convert, self.blur)), self.largest_sigma)

    def __reduce__(self) -> tuple[Callable[..., ViewParameters], tuple[object, ...]]:
        """Pickle by value: passing each small tensor as a shared-memory file costs its reader 0.2 ms a batch."""
        return _unpickle, tuple(self._map(Tensor.numpy))


def _unpickle(*fields: Any) -> ViewParameters:
    return ViewParameters(*fields)._map(torch.from_numpy)


def draw(
    view: WeakView | StrongView,
    *,
    seed: int,
    epoch: int,
    ids: ArrayLike,
    stream: int,
    sizes: Sequence[tuple[int, int]] | NDArray[np.int64],
) -> ViewParameters:
    """Draw the parameters of one view of each image of `ids` [B] and `sizes` [B, 2] (H, W), on the CPU.

    `stream`: ONLINE, TARGET, EVAL or another integer >= 0; views of different streams are independent.
    """
    strong = isinstance(view, StrongView)
    ids = np.asarray(ids, np.int64)
    numbers = uniform(seed, epoch, stream, ids, count=_DRAWS_STRONG if strong else _DRAWS_WEAK)  # [draws, B]
    boxes = torch.from_numpy(_boxes(view.crop_scale, np.asarray(sizes, np.int64).reshape(-1, 2), numbers))
    flip = torch.from_numpy(numbers[_DRAWS_WEAK - 1] < view.flip)
    if not isinstance(view, StrongView):
        none = torch.empty(0, dtype=torch.int64)
        blends, blur = torch.empty(0, 3, len(ids)), RowValues(none, torch.empty(0))
        return ViewParameters(boxes, flip, blends, hue=(), gray=none, blur=blur, largest_sigma=0.0)
    jitter, grayscale, blurred, sigma = numbers[_DRAWS_WEAK : _DRAWS_WEAK + 4]
    order, factors = numbers[_DRAWS_WEAK + 4 :].reshape(2, 4, -1)
    blends, hue = _jitter(view, jitter < view.jitter, order, factors)
    gray = torch.from_numpy(np.flatnonzero(grayscale < view.grayscale))
    low, high = view.blur_sigma
    blur = _row_values(blurred < view.blur, low + (high - low) * sigma)
    return ViewParameters(boxes, flip, blends, hue, gray, blur, high)


def crop(images: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
    """Cut the `boxes` [B, 4] out of uint8 images [3, H, W] and resize them: uint8 [B, 3, S, S], channels-last.

    Resizing is bilinear with antialiasing, image by image: 8-bit kernels are faster than matrix products over a batch,
    and a crop depends on nothing but its image and box.
    """
    crops = torch.empty(len(images), 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)
    interleaved = crops.permute(0, 2, 3, 1).numpy()  # [B, S, S, 3]
    for row, (image, (top, left, height, width)) in enumerate(zip(images, boxes.tolist(), strict=True)):
        part = image[:, top : top + height, left : left + width]
        if height <= size and width <= size:  # enlarging needs no antialiasing, and OpenCV's kernel is faster
            cv2.resize(part.permute(1, 2, 0).numpy(), (size, size), dst=interleaved[row])
        else:
            crops[row] = _resize(part, (size, size))
    return crops


def shrink(boxes: Tensor, factors: Tensor) -> Tensor:
    """`boxes` [B, 4] in the coordinates of images reduced by `factors` [B], to the nearest pixel."""
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    start, end = ((corner.double() / factors[:, None]).round().long() for corner in (start, end))
    return torch.cat([start, end - start], 1)


def augment(crops: Tensor, parameters: ViewParameters, config: ViewsConfig) -> Tensor:
    """Flip, jitter, gray, blur and normalize uint8 `crops` [B, 3, S, S]: float32 [B, 3, S, S] on their device.

    The parameters must be on the same device. Never synchronizes with a GPU.
    """
    flipped = torch.where(parameters.flip[:, None, None, None], crops.flip(3), crops)
    images = flipped.to(torch.float32, memory_format=torch.contiguous_format).div_(255)  # [B, 3, S, S]
    for blend, hue in zip(parameters.blends, parameters.hue, strict=True):
        blend_(images, *blend)
        if len(hue.rows):
            shift_hue_(images, *hue)
    if len(parameters.gray):
        gray_(images, parameters.gray)
    if len(parameters.blur.rows):
        blur_(images, *parameters.blur, parameters.largest_sigma)
    return normalize(images, config)


def augment_uint8_(crops: Tensor, parameters: ViewParameters) -> None:
    """Flip, jitter, gray and blur uint8 `crops` [B, 3, S, S] in place, on the CPU, channels-last."""
    blends, hues = parameters.blends.permute(2, 0, 1).tolist(), [hue.by_row() for hue in parameters.hue]
    gray, blur = set(parameters.gray.tolist()), parameters.blur.by_row()
    for row, (image, flip) in enumerate(zip(crops.permute(0, 2, 3, 1).numpy(), parameters.flip.tolist(), strict=True)):
        result = cv2.flip(image, 1) if flip else image  # [S, S, 3]
        for blend, hue in zip(blends[row], hues, strict=True):
            result = opencv_ops.shift_hue(result, hue[row]) if row in hue else opencv_ops.blend(result, *blend)
        if row in gray:
            result = opencv_ops.gray(result)
        if row in blur:
            result = opencv_ops.blur(result, blur[row], parameters.largest_sigma)
        if result is not image:
            image[:] = result


def center_crop(images: Sequence[Tensor], config: ViewsConfig) -> Tensor:
    """The evaluation view: resize the shorter side, crop the center. uint8 [3, H, W] each to uint8 [B, 3, S, S]."""
    size, resize = config.size, config.resize
    views = torch.empty(len(images), 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)
    for row, image in enumerate(images):
        image, removed = _cut_ends(image, resize)
        sides = [side * resize // min(image.shape[1:]) for side in image.shape[1:]]
        # Rounded as if nothing had been removed: half a pixel rounds to the even side.
        top, left = (round((side + 2 * cut - size) / 2) - cut for side, cut in zip(sides, removed, strict=True))
        if sides != list(image.shape[1:]):
            image = _resize(image, (sides[0], sides[1]))
        views[row] = image[:, top : top + size, left : left + size]
    return views


def _cut_ends(image: Tensor, resize: int) -> tuple[Tensor, tuple[int, int]]:
    """The middle of an elongated image [3, H, W], and how many resized pixels were cut off at each end of H and of W.

    Resizing all of a 1 × 20,000 px image to a shorter side of 256 px would take 15 GB. The cuts are whole pixels before
    and after resizing, so that the rest is sampled at the same places.
    """
    height, width = image.shape[1:]
    shorter, longer = sorted((height, width))
    step = shorter // math.gcd(shorter, resize)
    cut = max(0, longer - _LONGEST * shorter) // (2 * step) * step
    removed = cut * resize // shorter
    if height > width:
        return image[:, cut : height - cut], (removed, 0)
    return image[:, :, cut : width - cut], (0, removed)


def normalize(images: Tensor, config: ViewsConfig) -> Tensor:
    """Subtract the mean and divide by the standard deviation of each channel: float32 [B, 3, S, S].

    `images` [B, 3, S, S] are either float32 from 0 to 1, and changed in place, or uint8; on a CPU their layout is kept.
    """
    if images.dtype == torch.uint8:
        if images.device.type == "cpu" and images.is_contiguous(memory_format=torch.channels_last):
            return _normalize_interleaved(images.permute(0, 2, 3, 1), config).permute(0, 3, 1, 2)
        images = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        images[:, channel].sub_(mean).div_(std)
    return images


def _normalize_interleaved(images: Tensor, config: ViewsConfig) -> Tensor:
    """uint8 [B, S, S, 3] to normalized float32, in three passes over whole rows."""
    rows = images.flatten(2)  # [B, S, 3S]
    # Unlike torch, numpy requests huge pages; faults of small pages would take three times as long as the arithmetic.
    normalized = torch.from_numpy(np.empty(rows.shape, np.float32))
    mean, std = (torch.tensor(values, dtype=torch.float64).mul_(255) for values in (config.mean, config.std))
    repeats = images.shape[2]
    normalized.copy_(rows).sub_(mean.float().repeat(repeats)).mul_((1 / std).float().repeat(repeats))
    return normalized.view(images.shape)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] to uint8 [3, *size], bilinearly with antialiasing."""
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _boxes(scale: tuple[float, float], sizes: NDArray[np.int64], numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """Boxes [B, 4], drawn as by torchvision's RandomResizedCrop: ten tries, then a central crop."""
    heights, widths = sizes.T  # [B]
    low, high = scale
    areas = heights * widths * (low + (high - low) * numbers[:_TRIES])  # [tries, B]
    roots = np.exp((math.log(_RATIOS[0]) + math.log(_RATIOS[1] / _RATIOS[0]) * numbers[_TRIES : 2 * _TRIES]) / 2)
    sides = np.sqrt(areas)
    tried_widths, tried_heights = np.rint(sides * roots), np.rint(sides / roots)
    fits = (tried_widths > 0) & (tried_widths <= widths) & (tried_heights > 0) & (tried_heights <= heights)
    first, columns = fits.argmax(0), np.arange(len(sizes))
    success = fits[first, columns]
    central_widths = np.minimum(widths, np.rint(heights * _RATIOS[1]))
    central_heights = np.minimum(heights, np.rint(widths / _RATIOS[0]))
    box_widths = np.where(success, tried_widths[first, columns], central_widths)
    box_heights = np.where(success, tried_heights[first, columns], central_heights)
    spare_height, spare_width = heights - box_heights, widths - box_widths
    down, right = numbers[2 * _TRIES : 2 * _TRIES + 2]
    top = np.where(success, np.floor(down * (spare_height + 1)), spare_height // 2)
    left = np.where(success, np.floor(right * (spare_width + 1)), spare_width // 2)
    return np.stack([top, left, box_heights, box_widths], 1).astype(np.int64)


def _jitter(
    view: StrongView, chosen: NDArray[np.bool_], order: NDArray[np.float64], factors: NDArray[np.float64]
) -> tuple[Tensor, tuple[RowValues, ...]]:
    """`ViewParameters.blends` and `.hue` from random `order` and `factors` [4, B]; only images `chosen` [B] change."""
    strengths = np.array([view.brightness, view.contrast, view.saturation, view.hue])
    active = np.flatnonzero(strengths)
    offsets = (2 * factors - 1) * strengths[:, None]  # [4, B]; the config keeps strengths within 0..1
    weights = 1 + offsets
    operations = active[order[active].argsort(0)]  # [A, B]: at each position, one for each image
    blends, hue = np.empty((len(operations), 3, len(chosen)), np.float32), []
    for position, operation in enumerate(operations):
        weight = np.where(chosen & (operation != _HUE), weights[operation, np.arange(len(chosen))], 1.0)
        blends[position] = weight, (1 - weight) * (operation == _CONTRAST), (1 - weight) * (operation == _SATURATION)
        hue.append(_row_values(chosen & (operation == _HUE), offsets[_HUE]))
    return torch.from_numpy(blends), tuple(hue)


def _row_values(chosen: NDArray[np.bool_], values: NDArray[np.float64]) -> RowValues:
    rows = np.flatnonzero(chosen)
    return RowValues(torch.from_numpy(rows), torch.from_numpy(values[rows].astype(np.float32)))
