"""Each operation on a batch of float images equals torchvision's on single images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pictures import pictures
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from msf_faiss.views.tensor_ops import blend_, blur_, gray_, shift_hue_

COUNT = 12
ROWS = torch.tensor([0, 2, 5, 11])  # a gray and a black image among them
REST = torch.tensor([row for row in range(COUNT) if row not in ROWS])


def images(size: int = 32) -> Tensor:
    return torch.stack(pictures(COUNT, size, size)).float() / 255


@pytest.mark.parametrize(
    ("weights", "torchvision"),
    [
        (lambda factor: (0, 0), TF.adjust_brightness),
        (lambda factor: (1 - factor, 0), TF.adjust_contrast),
        (lambda factor: (0, 1 - factor), TF.adjust_saturation),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_blend(weights: Callable[[float], tuple[float, float]], torchvision: Callable[[Tensor, float], Tensor]) -> None:
    found, factors = images(), torch.linspace(0.1, 1.9, COUNT)
    expected = torch.stack([torchvision(*pair) for pair in zip(found, factors.tolist(), strict=True)])
    mean_weight, gray_weight = torch.tensor([weights(factor) for factor in factors.tolist()]).T
    blend_(found, factors, mean_weight, gray_weight)
    assert torch.allclose(found, expected, atol=1e-5)  # gray values are rounded to 2^-16 for the mean


def test_shift_hue() -> None:
    found, turns = images(), torch.tensor([0.5, -0.5, 0.01, 0.3])
    expected = found.clone()
    for row, shift in zip(ROWS, turns.tolist(), strict=True):
        expected[row] = TF.adjust_hue(found[row], shift)
    shift_hue_(found, ROWS, turns)
    assert torch.allclose(found, expected, atol=2e-6)


def test_gray() -> None:
    found = images()
    expected = found.clone()
    expected[ROWS] = TF.rgb_to_grayscale(found[ROWS], num_output_channels=3)
    gray_(found, ROWS)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("size", [8, 9, 32, 33])
@pytest.mark.parametrize(("sigmas", "radius"), [([0.1, 2.0, 1.3, 0.4], 6), ([0.01] * 4, 1), ([3.0, 4.0, 3.5, 3.2], 12)])
def test_blur(size: int, sigmas: list[float], radius: int) -> None:
    found = images(size)
    expected = found.clone()
    kernel = [2 * min(radius, size - 1) + 1] * 2
    for row, sigma in zip(ROWS, sigmas, strict=True):
        expected[row] = TF.gaussian_blur(found[row], kernel, [sigma] * 2)
    blur_(found, ROWS, torch.tensor(sigmas), max(sigmas))
    assert torch.equal(found[REST], expected[REST])
    assert (found - expected).abs().max() < 1 / 255  # pixels and weights are rounded to 11 bits
    steps = found[ROWS] * 2**22
    assert torch.equal(steps, steps.round())  # exact sums of products of 11 bits, whatever the order of addition
