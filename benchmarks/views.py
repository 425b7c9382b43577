"""Compare the CPU time of the views of a batch, stage by stage, with torchvision's v2 transforms, image by image.

    python benchmarks/views.py [--size 32] [--batch 128] [--rounds 15]

Variants take turns within each round, so that other load slows all of them. Times are CPU milliseconds per batch on one
thread (medians); ratios are medians of the ratios of each round.
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

BASELINE = "torchvision v2, strong view"


def torchvision_strong(config: ViewsConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The strong view (MSF, ICCV 2021, section 4) as composed from torchvision's transforms."""
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
    """Return the functions to measure, by name."""
    config = ViewsConfig(size=size)
    images = list(torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8))

    def draw_all(view: WeakView) -> ViewParameters:
        return draw(view, seed=0, epoch=1, ids=range(batch), stream=ONLINE, sizes=[(size, size)] * batch)

    weak, strong, no_hue = draw_all(config.weak), draw_all(config.strong), draw_all(StrongView(saturation=0, hue=0))
    crops = crop(images, weak.boxes, size)
    baseline = torchvision_strong(config)

    def for_gpu() -> torch.Tensor:
        parameters = draw_all(config.strong)
        return augment(crop(images, parameters.boxes, size), parameters, config)

    def for_cpu() -> torch.Tensor:
        parameters = draw_all(config.strong)
        views = crop(images, parameters.boxes, size)
        augment_uint8_(views, parameters)
        return normalize(views, config)

    return {
        "draw, strong view": lambda: draw_all(config.strong),
        "crop": lambda: crop(images, weak.boxes, size),
        "augment, weak view": lambda: augment(crops, weak, config),
        "augment, strong view": lambda: augment(crops, strong, config),
        "augment, strong view without hue and saturation": lambda: augment(crops, no_hue, config),
        "strong view from image to tensor, as for a GPU": for_gpu,
        "strong view from image to tensor, as for a CPU": for_cpu,
        BASELINE: lambda: torch.stack([baseline(image) for image in images]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=32, help="side of images and views, in pixels")
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
    for name, each in times.items():
        ratio = statistics.median(slow / own for slow, own in zip(times[BASELINE], each, strict=True))
        print(f"{statistics.median(each):8.1f} ms  {ratio:6.1f} x  {name}")


if __name__ == "__main__":
    main()
