"""Color jitter, grayscale and blur of one 8-bit image with OpenCV.

They match torchvision's operations on uint8 images, each rounded to 8 bits as Pillow does too. Each returns a new
image, or the given one if nothing changes.

Shapes: S pixels of a side; images are RGB [S, S, 3].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from cv2.typing import MatLike

_BLUR_STEPS = 256  # blur weights are multiples of 1/256, so that OpenCV's sums of 8-bit pixels are exact

cv2.setNumThreads(0)  # the worker processes are the parallelism; threads within them would only compete


def gray(image: MatLike) -> MatLike:
    """The luma of each pixel in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blend(image: MatLike, factor: float, mean_weight: float, gray_weight: float) -> MatLike:
    """factor * image + mean_weight * mean(gray(image)) + gray_weight * gray(image); see `tensor_ops.blend_`."""
    if factor == 1 and not mean_weight and not gray_weight:
        return image
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] if mean_weight else 0.0
    return cv2.addWeighted(image, factor, gray(image) if gray_weight else image, gray_weight, mean_weight * mean)


def shift_hue(image: MatLike, turns: float) -> MatLike:
    """Rotate the hue by `turns` of the color wheel, in steps of 1/256; keep saturation and value (HSV)."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :, 0] += np.uint8(round(256 * turns) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def blur(image: MatLike, sigma: float, largest_sigma: float) -> MatLike:
    """Gaussian blur with standard deviation `sigma` pixels, at most `largest_sigma`; edges are reflected."""
    radius = min(math.ceil(3 * largest_sigma), len(image) - 1)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = np.rint(weights * (_BLUR_STEPS / weights.sum()))
    weights[radius] += _BLUR_STEPS - weights.sum()
    weights = (np.trim_zeros(weights) / _BLUR_STEPS).astype(np.float32)
    return cv2.sepFilter2D(image, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)
