"""Color jitter, grayscale and blur of a batch of float32 images in place, each image with its own parameters.

They match torchvision's operations on float images (values 0 to 1). All loop counts and indices are known on the CPU,
so nothing here synchronizes with a GPU. The result for an image does not depend on the other images of its batch.

Shapes: B images, n of them selected by an operation, S pixels of a side.
"""

import math

import torch
from torch import Tensor

_RED, _GREEN, _BLUE = 0.2989, 0.587, 0.114  # ITU-R 601, as torchvision rounds it
_MEAN_STEPS = 2.0**16  # gray values are rounded to 2^-16 before they are averaged
_BLUR_STEPS = 2.0**11  # pixels and weights of the blur are rounded to 2^-11: their products are exact even in TF32


def gray(images: Tensor) -> Tensor:
    """Luma of [B, 3, S, S]: [B, S, S]."""
    red, green, blue = images.unbind(1)
    return (red * _RED).add_(green * _GREEN).add_(blue * _BLUE)


def blend_(images: Tensor, factor: Tensor, mean_weight: Tensor, gray_weight: Tensor) -> None:
    """factor * image + mean_weight * mean(gray(image)) + gray_weight * gray(image), clamped to 0..1; all weights [B].

    Brightness, contrast and saturation all have this form, so one call can apply a different one to each image.
    """
    luma = gray(images)  # [B, S, S]
    # Integers add up exactly in float64, so the mean does not depend on the order of summation.
    mean = (luma * _MEAN_STEPS).round_().sum((1, 2), dtype=torch.float64).div_(_MEAN_STEPS * luma[0].numel())
    offset = luma.mul_(gray_weight[:, None, None]).add_((mean.to(torch.float32) * mean_weight)[:, None, None])
    images.mul_(factor[:, None, None, None]).add_(offset[:, None]).clamp_(0, 1)


def shift_hue_(images: Tensor, rows: Tensor, turns: Tensor) -> None:
    """Rotate the hue of `images[rows]` by `turns` [n] of the color wheel; keep saturation and value (HSV)."""
    red, green, blue = images.index_select(0, rows).unbind(1)  # [n, S, S] each
    value = torch.maximum(torch.maximum(red, green), blue)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - lowest
    divisor = chroma.clamp(min=1e-12)  # gray pixels get hue 0, which has no effect
    hue = torch.where(
        value == red,
        (green - blue).div_(divisor),
        torch.where(value == green, (blue - red).div_(divisor).add_(2), (red - green).div_(divisor).add_(4)),
    )  # in sixths of a turn
    hue.add_(6 * turns[:, None, None])
    hue -= (hue / 6).floor_().mul_(6)
    levels = torch.stack([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1)  # [n, 3, S, S]
    shifted = levels.clamp_(0, 1).mul_(chroma[:, None]).add_(lowest[:, None])
    images.index_copy_(0, rows, shifted)


def gray_(images: Tensor, rows: Tensor) -> None:
    """Replace `images[rows]` by their luma."""
    luma = gray(images.index_select(0, rows))
    images.index_copy_(0, rows, luma[:, None].expand(-1, 3, -1, -1))


def blur_(images: Tensor, rows: Tensor, sigmas: Tensor, largest_sigma: float) -> None:
    """Gaussian blur of `images[rows]` with standard deviations `sigmas` [n] pixels; edges are reflected.

    The kernel has a radius of 3 * `largest_sigma` pixels, or S - 1 if that is less. Pixels and weights are rounded to
    2^-11, so that both matrix products are exact and do not depend on the order in which a BLAS adds.
    """
    size = images.shape[-1]
    matrices = _blur_matrices(sigmas, size, min(math.ceil(3 * largest_sigma), size - 1))  # [n, S, S]
    with torch.autocast(images.device.type, enabled=False):
        pixels = images.index_select(0, rows).mul_(_BLUR_STEPS).round_().view(len(rows), 3 * size, size)
        across = torch.bmm(pixels, matrices.transpose(1, 2)).div_(_BLUR_STEPS).round_()  # [n, 3S, S]
        across = across.view(-1, 3, size, size).transpose(1, 2).reshape(-1, size, 3 * size)
        down = torch.bmm(matrices, across).div_(_BLUR_STEPS * _BLUR_STEPS)  # [n, S, 3S]
    images.index_copy_(0, rows, down.view(-1, size, 3, size).transpose(1, 2))


def _blur_matrices(sigmas: Tensor, size: int, radius: int) -> Tensor:
    """[n, S, S]: row i has the weights of a line's pixels in the blurred pixel i, in units of 2^-11."""
    distance = torch.arange(-radius, radius + 1, device=sigmas.device)
    kernels = (-0.5 * (distance / sigmas[:, None].double()).square()).exp()  # [n, 2 radius + 1]
    kernels = (kernels / kernels.sum(1, keepdim=True)).mul_(_BLUR_STEPS).round_()
    kernels[:, radius] += _BLUR_STEPS - kernels.sum(1)
    # Rows of width + 1 elements, read as rows of `width`, shift the kernel one to the right from row to row.
    width = size + 2 * radius
    padded = torch.nn.functional.pad(kernels.to(torch.float32), (0, size))  # [n, width + 1]
    wide = padded.repeat(1, size)[:, : size * width].view(-1, size, width)
    matrices = wide[:, :, radius : radius + size].contiguous()
    matrices[:, :, 1 : radius + 1] += wide[:, :, :radius].flip(2)
    matrices[:, :, size - 1 - radius : size - 1] += wide[:, :, radius + size :].flip(2)
    return matrices
