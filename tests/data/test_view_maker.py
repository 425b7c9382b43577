from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from fake_source import FakeSource, config
from PIL import Image
from torch import Tensor

from msf_faiss.data.source import Reduce
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.view_maker import Reduction, ViewMaker
from msf_faiss.views.random_view import ONLINE, TARGET, augment, augment_uint8_


def test_a_gpu_gets_crops_and_parameters_instead_of_finished_views() -> None:
    source, views = FakeSource(30), config().views
    on_cpu = ViewMaker(source, config(), {ONLINE: views.strong})(np.arange(30), 2)[1][ONLINE]
    gpu = torch.device("cuda")
    on_gpu = ViewMaker(source, config(), {ONLINE: views.strong}, gpu)(np.arange(30), 2)[1][ONLINE]
    assert on_cpu.parameters is None
    assert on_gpu.parameters is not None
    augmented = on_gpu.pixels.clone(memory_format=torch.channels_last)
    augment_uint8_(augmented, on_gpu.parameters)
    assert torch.equal(on_cpu.pixels, augmented)
    assert torch.equal(on_gpu.augment(views), augment(on_gpu.pixels, on_gpu.parameters, views))


# Reduced decoding of large JPEGs


def photos(folder: Path, count: int, height: int, width: int) -> FolderSource:
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index:03}.jpg", quality=95)
    return FolderSource(folder)


class FullSizeSource(FolderSource):
    """Never reduces an image."""

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        return super().decode(index)


def test_views_of_reduced_jpegs_match_those_of_full_ones(tmp_path: Path) -> None:
    settings = config(size=48)
    kinds, ids = {ONLINE: settings.views.weak, TARGET: settings.views.weak}, np.arange(40)
    source = photos(tmp_path, 40, 360, 480)
    reduced, full = (ViewMaker(each, settings, kinds)(ids, 1)[1] for each in (source, FullSizeSource(tmp_path)))
    for stream in kinds:
        found, expected = reduced[stream].pixels.float(), full[stream].pixels.float()
        # A corner is off by at most half a pixel of the reduced image, so by less of the view. Where colors change
        # completely over 48 / 16 pixels, a shift by one pixel would show.
        assert (found - expected).abs().mean() < 6
        shifted = expected.roll(4, dims=3)
        assert (found - shifted).abs().mean() > 3 * (found - expected).abs().mean()


def test_reduction_keeps_every_crop_at_least_as_large_as_the_view() -> None:
    boxes: list[list[int]] = []
    reduction = Reduction(lambda index, size: boxes, 100)
    assert reduction(0, 199, 5000) == 1  # decided without drawing: no crop can be large enough
    for shortest, factor in [(90, 1), (199, 1), (200, 2), (399, 2), (400, 4), (801, 8), (5000, 8)]:
        boxes[:] = [[0, 0, 900, 900], [7, 9, shortest, 1000]]
        assert reduction(shortest, 5000, 4000) == factor
    assert reduction.reduced == {
        index: (5000, 4000, factor) for index, factor in [(200, 2), (399, 2), (400, 4), (801, 8), (5000, 8)]
    }


def test_views_of_reduced_jpegs_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    source, settings = photos(tmp_path, 8, 100, 120), config()
    make = ViewMaker(source, settings, {ONLINE: settings.views.strong})
    together = make(np.arange(8), 3)[1][ONLINE].pixels
    for index in (0, 5):
        assert torch.equal(make(np.array([index]), 3)[1][ONLINE].pixels[0], together[index])
