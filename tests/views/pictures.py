"""Images for the tests of views."""

import torch
from torch import Tensor


def pictures(count: int, height: int = 32, width: int = 32) -> list[Tensor]:
    """uint8 [3, height, width]: smooth color fields with noise, of which the first is gray and the last black."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    fields = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    images = (fields + 0.1 * torch.randn(fields.shape, generator=generator)).mul(255).clamp(0, 255).to(torch.uint8)
    images[0] = images[0, :1]
    images[-1] = 0
    return list(images)
