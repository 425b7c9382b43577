"""Each operation on a uint8 image equals torchvision's on a float image, up to the rounding to 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pictures import pictures
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from msf_faiss.views.opencv_ops import blend, blur, gray, shift_hue

Operation = Callable[[Any, float], Any]  # of an image and its strength


def torchvision_blur(radius: int) -> Operation:
    def operation(image: Tensor, sigma: float) -> Tensor:
        kernel = [2 * min(radius, image.shape[-1] - 1) + 1] * 2
        return TF.gaussian_blur(image, kernel, [sigma] * 2)

    return operation


@pytest.mark.parametrize(
    ("opencv", "torchvision", "strengths", "largest", "mean"),
    [
        (lambda image, x: blend(image, x, 0, 0), TF.adjust_brightness, (0.1, 1.9), 0.55, 0.3),  # one rounding
        (lambda image, x: blend(image, x, 1 - x, 0), TF.adjust_contrast, (0.1, 1.9), 0.55, 0.3),
        (lambda image, x: blend(image, x, 0, 1 - x), TF.adjust_saturation, (0.1, 1.9), 1.0, 0.35),  # gray rounded first
        # An 8-bit hue has 42.7 steps in a sixth of the color wheel, in which a channel may run through 255 values; both
        # the hue and its shift are off by up to half a step.
        (shift_hue, TF.adjust_hue, (-0.5, 0.5), 12, 0.6),
        (lambda image, _: gray(image), lambda image, _: TF.rgb_to_grayscale(image, 3), (1, 1), 0.55, 0.3),
        (lambda image, x: blur(image, x, 2.0), torchvision_blur(6), (0.1, 2.0), 2.5, 0.35),  # weights are rounded too
        (lambda image, x: blur(image, x, 4.0), torchvision_blur(12), (3.0, 4.0), 4, 0.6),
        (lambda image, x: blur(image, x, 0.02), torchvision_blur(1), (0.01, 0.02), 0, 0),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "gray", "blur", "wide blur", "narrow blur"],
)
@pytest.mark.parametrize("size", [9, 32])
def test_operation(
    size: int,
    opencv: Operation,
    torchvision: Operation,
    strengths: tuple[float, float],
    largest: float,
    mean: float,
) -> None:
    differences = []
    for image, strength in zip(pictures(24, size, size), np.linspace(*strengths, 24).tolist(), strict=True):
        found = torch.from_numpy(opencv(image.permute(1, 2, 0).contiguous().numpy(), strength)).permute(2, 0, 1)
        differences.append((found - 255 * torchvision(image.float() / 255, strength)).abs())
    assert torch.stack(differences).max() <= largest
    assert torch.stack(differences).mean() <= mean


def test_blend_returns_the_image_itself_if_nothing_changes() -> None:
    image = np.zeros((3, 3, 3), np.uint8)
    assert blend(image, 1.0, 0.0, 0.0) is image
