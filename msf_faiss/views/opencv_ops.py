"""Colour jitter, grayscale and blur of a single image of 8 bits, by OpenCV.

The operations are those of torchvision's 8-bit images, each rounded to 8 bits, as Pillow does it too. They return a new
image, and wherever nothing changes the same one.

Shapes: S pixels of a side; images are [S, S, 3], RGB.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from cv2.typing import MatLike

_BLUR_STEPS = 256  # of a blur's weights: OpenCV's sums of 8-bit pixels are then exact whole numbers

# Images are dealt with in parallel by worker processes, and a pool of threads in each of them would be in their way.
cv2.setNumThreads(0)


def gray(image: MatLike) -> MatLike:
    """Each pixel's luma in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blend(image: MatLike, factor: float, mean_share: float, gray_share: float) -> MatLike:
    """factor * image + mean_share * (mean of its grey) + gray_share * (its grey): see `colors.blend_`."""
    if factor == 1 and not mean_share and not gray_share:
        return image
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] if mean_share else 0.0
    return cv2.addWeighted(image, factor, gray(image) if gray_share else image, gray_share, mean_share * mean)


def shift_hue(image: MatLike, turns: float) -> MatLike:
    """Rotate the hue by `turns` of the colour wheel, in steps of 1/256; value and saturation (HSV) stay."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :, 0] += np.uint8(round(256 * turns) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def blur(image: MatLike, sigma: float, largest: float) -> MatLike:
    """Gaussian blur with `sigma` pixels, at most `largest`; edges are reflected. See `colors.blur_`."""
    radius = min(math.ceil(3 * largest), len(image) - 1)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = np.rint(weights * (_BLUR_STEPS / weights.sum()))
    weights[radius] += _BLUR_STEPS - weights.sum()
    weights = (np.trim_zeros(weights) / _BLUR_STEPS).astype(np.float32)
    return cv2.sepFilter2D(image, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)
