"""What the views of one batch cost on the CPU, stage by stage, beside torchvision's v2 transforms image by image.

    python benchmarks/views.py [--size 32] [--batch 128] [--rounds 15]

Variants take turns within each round, so that a busy machine slows all of them; times are CPU milliseconds of one
thread for a batch (medians), ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torchvision.transforms import v2

from msf_faiss.config import StrongView, ViewsConfig, WeakView
from msf_faiss.search.faiss_setup import set_threads
from msf_faiss.views.random_view import ONLINE, ViewParameters, augment, augment_uint8_, crop, draw, normalize

TWIN = "torchvision v2, strong view"


def torchvision_strong(config: ViewsConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The strong view of design 1 as torchvision's users write it."""
    strong, size = config.strong, config.size
    jitter = v2.ColorJitter(strong.brightness, strong.contrast, strong.saturation, strong.hue)
    transforms: Callable[[torch.Tensor], torch.Tensor] = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=strong.crop_scale, antialias=True),
            v2.RandomHorizontalFlip(strong.flip),
            v2.RandomApply([jitter], p=strong.jitter),
            v2.RandomGrayscale(strong.grayscale),
            v2.RandomApply([v2.GaussianBlur(13 if size > 13 else 3, strong.blur_sigma)], p=strong.blur),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config.mean, config.std),
        ]
    )
    return transforms


def variants(size: int, batch: int) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    config = ViewsConfig(size=size)
    images = list(torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8))
    grey = StrongView(saturation=0.0, hue=0.0)

    def drawn(view: WeakView) -> ViewParameters:
        return draw(view, seed=0, epoch=1, ids=range(batch), stream=ONLINE, sizes=[(size, size)] * batch)

    weak, strong, no_hue = drawn(config.weak), drawn(config.strong), drawn(grey)
    crops = crop(images, weak.boxes, size)
    twin = torchvision_strong(config)

    def whole() -> torch.Tensor:
        parameters = drawn(config.strong)
        return augment(crop(images, parameters.boxes, size), parameters, config)

    def bytewise() -> torch.Tensor:
        parameters = drawn(config.strong)
        cut = crop(images, parameters.boxes, size)
        augment_uint8_(cut, parameters)
        return normalize(cut, config)

    return {
        "draw, strong view": lambda: drawn(config.strong),
        "crop": lambda: crop(images, weak.boxes, size),
        "augment, weak view": lambda: augment(crops, weak, config),
        "augment, strong view": lambda: augment(crops, strong, config),
        "augment, strong view without hue and saturation": lambda: augment(crops, no_hue, config),
        "all of a strong view, as for a GPU": whole,
        "all of a strong view, in 8 bits": bytewise,
        TWIN: lambda: torch.stack([twin(image) for image in images]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=32, help="pixels of a side, of images and views")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    set_threads(1)
    measured = variants(arguments.size, arguments.batch)
    times: dict[str, list[float]] = {name: [] for name in measured}
    for round_number in range(arguments.rounds + 1):
        for name, work in measured.items():
            start = time.process_time()
            work()
            if round_number:  # the first warms up
                times[name].append(1000 * (time.process_time() - start))
    print(f"{arguments.batch} images of {arguments.size} px, torch {torch.__version__}, one thread")
    for name, found in times.items():
        ratio = statistics.median(twin / own for twin, own in zip(times[TWIN], found, strict=True))
        print(f"{statistics.median(found):8.1f} ms  {ratio:6.1f} x  {name}")


if __name__ == "__main__":
    main()
