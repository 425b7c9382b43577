"""Compare the input pipeline, from JPEGs to both normalised views, with PIL, torchvision and kornia.

    python benchmarks/input.py PARQUET [--size 224] [--enlarge 1000] [--batch 64] [--batches 6] [--rounds 5]

PARQUET has images in the format of `data.kind: parquet`; `--enlarge` resizes their shorter side and encodes them again.
Rows take turns within each round and use the same loader with the same number of workers. CPU milliseconds are per
image, summed over all processes. Figures are medians over the rounds, ratios are medians of the ratios of each round.
Loading starts before the clock.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from itertools import count
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from msf_faiss.config import Config, ViewsConfig
from msf_faiss.data.source import Reduce
from msf_faiss.data.sources.decode import decode_image
from msf_faiss.data.view_maker import Crops, ViewMaker
from msf_faiss.data.workers import load
from msf_faiss.search.faiss_setup import set_threads
from msf_faiss.views.random_view import ONLINE, TARGET

Views = tuple[Tensor, Tensor]  # weak and strong, [B, 3, S, S] float32 each


class PilPipeline:
    """torchvision's transforms of PIL images, one by one, as most code does it."""

    def __init__(self, jpegs: Sequence[bytes], config: ViewsConfig) -> None:
        self.jpegs, self.config = jpegs, config

    @cached_property
    def transforms(self) -> tuple[Callable[[Image.Image], Tensor], Callable[[Image.Image], Tensor]]:
        strong, last = self.config.strong, [v1.ToTensor(), v1.Normalize(self.config.mean, self.config.std)]
        first = [v1.RandomResizedCrop(self.config.size, strong.crop_scale), v1.RandomHorizontalFlip(strong.flip)]
        colors = [
            v1.RandomApply([v1.ColorJitter(strong.brightness, strong.contrast, strong.saturation, strong.hue)], 0.8),
            v1.RandomGrayscale(strong.grayscale),
            v1.RandomApply([v1.Lambda(self.blur)], strong.blur),
        ]
        return v1.Compose([*first, *last]), v1.Compose([*first, *colors, *last])

    def blur(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.config.strong.blur_sigma)))

    def __call__(self, ids: Sequence[int], number: int) -> Views:
        weak, strong = self.transforms
        images = [Image.open(io.BytesIO(self.jpegs[index])).convert("RGB") for index in ids]
        return torch.stack([weak(image) for image in images]), torch.stack([strong(image) for image in images])


class V2Pipeline:
    """torchvision's v2 transforms of uint8 tensors, one by one."""

    def __init__(self, jpegs: Sequence[bytes], config: ViewsConfig) -> None:
        self.jpegs, self.config = jpegs, config

    @cached_property
    def transforms(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        strong = self.config.strong
        last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.config.mean, self.config.std)]
        first = [v2.RandomResizedCrop(self.config.size, strong.crop_scale), v2.RandomHorizontalFlip(strong.flip)]
        colors = [
            v2.RandomApply([v2.ColorJitter(strong.brightness, strong.contrast, strong.saturation, strong.hue)], 0.8),
            v2.RandomGrayscale(strong.grayscale),
            v2.RandomApply([v2.GaussianBlur(13, strong.blur_sigma)], strong.blur),
        ]
        return v2.Compose([*first, *last]), v2.Compose([*first, *colors, *last])

    def decode(self, ids: Sequence[int]) -> list[Tensor]:
        encoded = [torch.from_numpy(np.frombuffer(self.jpegs[index], np.uint8).copy()) for index in ids]
        return [decode_jpeg(one, ImageReadMode.RGB) for one in encoded]

    def __call__(self, ids: Sequence[int], number: int) -> Views:
        weak, strong = self.transforms
        images = self.decode(ids)
        return torch.stack([weak(image) for image in images]), torch.stack([strong(image) for image in images])


class KorniaPipeline(V2Pipeline):
    """kornia's batched augmentations of float tensors; all images must have the same size."""

    @cached_property
    def transforms(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        from kornia import augmentation as k

        size, strong = (self.config.size, self.config.size), self.config.strong
        mean, std = torch.tensor(self.config.mean), torch.tensor(self.config.std)
        first = [k.RandomResizedCrop(size, strong.crop_scale), k.RandomHorizontalFlip(p=strong.flip)]
        colors = [
            k.ColorJitter(strong.brightness, strong.contrast, strong.saturation, strong.hue, p=strong.jitter),
            k.RandomGrayscale(p=strong.grayscale),
            k.RandomGaussianBlur((13, 13), strong.blur_sigma, p=strong.blur),
        ]
        last = k.Normalize(mean, std)
        return torch.nn.Sequential(*first, last), torch.nn.Sequential(*first, *colors, last)

    def __call__(self, ids: Sequence[int], number: int) -> Views:
        weak, strong = self.transforms
        images = torch.stack(self.decode(ids)).float() / 255
        return weak(images), strong(images)


class JpegSource:
    """A `Source` of encoded images in memory."""

    labels, classes, in_memory = None, None, False

    def __init__(self, jpegs: Sequence[bytes]) -> None:
        self.jpegs = jpegs

    def __len__(self) -> int:
        return len(self.jpegs)

    def name(self, index: int) -> str:
        return f"image {index}"

    def identity(self) -> str:
        return "jpegs"

    def relative_names(self) -> list[str]:
        return [self.name(index) for index in range(len(self))]

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        return decode_image(self.jpegs[index], lambda: self.name(index), reduce)


class OurPipeline:
    """msf-faiss: 8-bit views from the workers, normalised in the main process, as in training on a CPU."""

    source = JpegSource

    def __init__(self, jpegs: Sequence[bytes], config: ViewsConfig) -> None:
        whole = Config.model_validate({"train": {"device": "cpu"}, "views": config.model_dump()})
        self.make = ViewMaker(self.source(jpegs), whole, {TARGET: config.weak, ONLINE: config.strong})

    def __call__(self, ids: Sequence[int], number: int) -> tuple[Crops, Crops]:
        views = self.make(np.array(ids), number)[1]
        return views[TARGET], views[ONLINE]


class FullSizeSource(JpegSource):
    """Decodes images in full size."""

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        return super().decode(index)


class FullSizePipeline(OurPipeline):
    """msf-faiss without downscaling while decoding."""

    source = FullSizeSource


class Done(NamedTuple):
    """A batch, and the CPU time that its process had used when it was ready."""

    views: Views | tuple[Crops, Crops]
    process: int
    seconds: float


class Work:
    """Makes the batch with a given number; pickled into the workers."""

    def __init__(self, make: PilPipeline | V2Pipeline | OurPipeline, images: int, batch: int) -> None:
        self.make, self.images, self.batch = make, images, batch

    def __call__(self, number: int) -> Done:
        torch.set_num_threads(1)
        views = self.make([(number * self.batch + row) % self.images for row in range(self.batch)], number)
        return Done(views, os.getpid(), time.process_time())


def finish(done: Done, config: ViewsConfig) -> None:
    """Do the part of the main process, until both views are ready for training."""
    for view in done.views:
        view = view.augment(config) if isinstance(view, Crops) else view
        assert view.dtype == torch.float32


def measure(work: Work, config: ViewsConfig, *, workers: int, batches: int) -> tuple[float, float]:
    """Return images per second and CPU milliseconds per image."""
    results: Iterator[Done] = load(work, count(), workers=workers)
    first: dict[int, float] = {}
    warm_up = 1 + 3 * workers  # batches that the workers make ahead
    for _ in range(warm_up):
        done = next(results)
        finish(done, config)
        first[done.process] = done.seconds
    own, wall, last = time.process_time(), time.perf_counter(), dict(first)
    for _ in range(batches):
        done = next(results)
        finish(done, config)
        last[done.process] = done.seconds
    wall, own = time.perf_counter() - wall, time.process_time() - own
    results.close()  # type: ignore[attr-defined]
    helpers = sum(last[one] - first[one] for one in first) if workers else 0.0
    images = batches * work.batch
    return images / wall, 1000 * (own + helpers) / images


def read_jpegs(path: str, images: int, enlarge: int | None) -> list[bytes]:
    encoded = [row["bytes"] for row in pq.read_table(path, columns=["image"]).slice(0, images)["image"].to_pylist()]
    return [_enlarged(one, enlarge) for one in encoded] if enlarge else encoded


def _enlarged(encoded: bytes, shorter: int) -> bytes:
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    times = shorter / min(image.size)
    buffer = io.BytesIO()
    image.resize((round(image.width * times), round(image.height * times)), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=90
    )
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parquet")
    parser.add_argument("--size", type=int, default=224, help="side of the views in pixels")
    parser.add_argument("--enlarge", type=int, help="resize the shorter side of the images to this first")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6, help="timed batches per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    set_threads(1)
    jpegs = read_jpegs(arguments.parquet, arguments.images, arguments.enlarge)
    config = ViewsConfig(size=arguments.size)
    makers = {"PIL": PilPipeline, "torchvision v2": V2Pipeline, "kornia": KorniaPipeline, "msf-faiss": OurPipeline}
    if arguments.enlarge:
        makers["msf-faiss, decoding in full size"] = FullSizePipeline
    if find_spec("kornia") is None:
        del makers["kornia"]
    print(f"{len(jpegs)} images, views of {arguments.size} px, torch {torch.__version__}")
    print("| workers | pipeline | images/s | CPU ms per image | images/s ÷ PIL's | PIL's CPU ÷ its |")
    print("|---|---|---|---|---|---|")
    for workers in arguments.workers:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
        for _ in range(arguments.rounds):
            for name, maker in makers.items():
                work = Work(maker(jpegs, config), len(jpegs), arguments.batch)
                found[name].append(measure(work, config, workers=workers, batches=arguments.batches))
        for name, rounds in found.items():
            speed, cpu = (statistics.median(each) for each in zip(*rounds, strict=True))
            pairs = list(zip(rounds, found["PIL"], strict=True))
            faster = statistics.median(own[0] / pil[0] for own, pil in pairs)
            cheaper = statistics.median(pil[1] / own[1] for own, pil in pairs)
            print(f"| {workers} | {name} | {speed:,.0f} | {cpu:.2f} | {faster:.2f} | {cheaper:.2f} |", flush=True)


if __name__ == "__main__":
    main()
