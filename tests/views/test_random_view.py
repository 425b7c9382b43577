"""Draws are pure functions of counters; crops and whole views equal torchvision's, in both ways of augmenting."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from pictures import pictures
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from msf_faiss.config import StrongView, ViewsConfig, WeakView
from msf_faiss.views.random_view import (
    ONLINE,
    TARGET,
    RowValues,
    ViewParameters,
    augment,
    augment_uint8_,
    center_crop,
    crop,
    draw,
    normalize,
    shrink,
)

PLAIN = ViewsConfig(mean=(0, 0, 0), std=(1, 1, 1), size=32)


def draw_some(
    view: WeakView, ids: range | list[int], *, size: tuple[int, int] = (32, 32), epoch: int = 3
) -> ViewParameters:
    return draw(view, seed=7, epoch=epoch, ids=ids, stream=ONLINE, sizes=[size] * len(ids))


def augment_one_by_one(crops: Tensor, parameters: ViewParameters, config: ViewsConfig) -> Tensor:
    """`augment` with torchvision's functions, image by image."""
    views = []
    hues, blur = [hue.by_row() for hue in parameters.hue], parameters.blur.by_row()
    for row, pixels in enumerate(crops):
        image = pixels.float() / 255
        if parameters.flip[row]:
            image = TF.horizontal_flip(image)
        for blend, hue in zip(parameters.blends, hues, strict=True):
            factor, mean_weight, gray_weight = blend[:, row].tolist()
            if row in hue:
                image = TF.adjust_hue(image, hue[row])
            elif mean_weight:
                image = TF.adjust_contrast(image, factor)
            elif gray_weight:
                image = TF.adjust_saturation(image, factor)
            else:
                image = TF.adjust_brightness(image, factor)
        if row in parameters.gray:
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        if row in blur:
            radius = min(math.ceil(3 * parameters.largest_sigma), image.shape[-1] - 1)
            image = TF.gaussian_blur(image, [2 * radius + 1] * 2, [blur[row]] * 2)
        views.append(TF.normalize(image, list(config.mean), list(config.std)))
    return torch.stack(views)


def augment_uint8(crops: Tensor, parameters: ViewParameters) -> Tensor:
    """`augment_uint8_` on a copy."""
    result = crops.clone().contiguous(memory_format=torch.channels_last)
    augment_uint8_(result, parameters)
    return result


def largest_gap(first: Tensor, second: Tensor) -> float:
    """Kolmogorov-Smirnov statistic of two samples of n values: above 1.95 * sqrt(2 / n) once in a thousand times if
    both have the same distribution."""
    first, second = first.sort().values, second.sort().values
    points = torch.cat([first, second])
    below = torch.searchsorted(first, points, right=True) - torch.searchsorted(second, points, right=True)
    return float(below.abs().max()) / len(first)


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, tuple):
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    else:
        assert one == other


# Drawing


def test_draws_do_not_depend_on_the_batch() -> None:
    def values_of(pairs: RowValues, row: int) -> float | None:
        return pairs.by_row().get(row)

    together = draw_some(StrongView(), range(300))
    for row in (0, 1, 17, 299):
        alone = draw_some(StrongView(), [row])
        assert torch.equal(alone.boxes[0], together.boxes[row])
        assert alone.flip[0] == together.flip[row]
        assert torch.equal(alone.blends[:, :, 0], together.blends[:, :, row])
        assert [values_of(hue, 0) for hue in alone.hue] == [values_of(hue, row) for hue in together.hue]
        assert len(alone.gray) == (row in together.gray)
        assert values_of(alone.blur, 0) == values_of(together.blur, row)


@pytest.mark.parametrize("change", [{"seed": 8}, {"epoch": 4}, {"stream": TARGET}, {"ids": range(100, 200)}])
def test_each_counter_changes_the_draws(change: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"seed": 7, "epoch": 3, "stream": ONLINE, "ids": range(100), "sizes": [(64, 64)] * 100}
    first, second = draw(WeakView(), **usual), draw(WeakView(), **usual | change)
    assert (first.boxes == second.boxes).all(1).sum() <= 2  # equal by chance only: some 10^5 boxes are possible
    assert 20 < (first.flip == second.flip).sum() < 80  # 50 ± 5, six standard deviations


@pytest.mark.parametrize(
    ("size", "scale"), [((64, 48), (0.2, 1.0)), ((224, 224), (0.08, 1.0)), ((30, 200), (0.4, 0.9))]
)
def test_boxes_have_the_distribution_of_torchvisions(size: tuple[int, int], scale: tuple[float, float]) -> None:
    count = 4000
    boxes = draw_some(WeakView(crop_scale=scale), range(count), size=size).boxes.double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, *size)
        tries = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    expected = torch.tensor(tries).double()
    for name, statistic in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "ratio": lambda box: box[:, 3] / box[:, 2],
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
    }.items():
        assert largest_gap(statistic(boxes), statistic(expected)) < 1.95 * math.sqrt(2 / count), name


def test_boxes_stay_inside_and_extreme_shapes_get_a_central_crop() -> None:
    sizes = [(1, 1), (1, 500), (500, 1), (7, 300), (300, 7), (33, 32), (2, 2), (4000, 3000)] * 50
    boxes = draw(WeakView(), seed=0, epoch=0, ids=range(400), stream=0, sizes=sizes).boxes
    top, left, height, width = boxes.T
    whole = torch.tensor(sizes)
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] >= 0).all()
    assert (top + height <= whole[:, 0]).all()
    assert (left + width <= whole[:, 1]).all()
    assert boxes[1].tolist() == [0, 249, 1, 1]  # torchvision's fallback: full height, 4:3, centered
    assert boxes[3].tolist() == [0, 145, 7, 9]


def test_box_positions_are_uniform() -> None:
    top, _, height, _ = draw_some(WeakView(crop_scale=(0.8, 1)), range(4000)).boxes.T
    shares = top[height == 30].bincount(minlength=3) / (height == 30).sum()
    assert len(shares) == 3
    assert (shares - 1 / 3).abs().max() < 0.12  # five standard deviations of a share of 400
    assert (height == 30).sum() > 400


def test_probabilities_and_strengths_follow_the_config() -> None:
    count = 4000
    view = StrongView(
        flip=0.3, jitter=0.6, brightness=0.5, contrast=0.2, saturation=0.7, hue=0.25, blur_sigma=(0.5, 1.5)
    )
    parameters = draw_some(view, range(count))
    sigmas = parameters.blur.values
    for share, expected in [
        (parameters.flip.float().mean(), 0.3),
        (len(parameters.gray) / count, 0.2),
        (len(sigmas) / count, 0.5),
        (sum(len(hue.rows) for hue in parameters.hue) / count, 0.6),
        *((len(hue.rows) / count, 0.15) for hue in parameters.hue),  # the order of operations is uniform
    ]:
        assert share == pytest.approx(expected, abs=0.04)  # five standard deviations of a share of 4000
    shifts = torch.cat([hue.values for hue in parameters.hue])
    assert -0.25 <= shifts.min() < -0.24 < 0.24 < shifts.max() <= 0.25
    assert 0.5 <= sigmas.min() < 0.51 < 1.49 < sigmas.max() <= 1.5
    factor, mean_weight, gray_weight = parameters.blends.unbind(1)  # [4, count] each
    for rows, strength in [(mean_weight != 0, 0.2), (gray_weight != 0, 0.7)]:
        assert rows.sum(0).max() == 1
        assert rows.any(0).float().mean() == pytest.approx(0.6, abs=0.04)
        assert 1 - strength <= factor[rows].min() < 1 - 0.9 * strength
        assert 1 + 0.9 * strength < factor[rows].max() <= 1 + strength + 1e-6  # float32 stores 1.2 as 1.2000000477


def test_parameters_survive_pickling() -> None:
    for view in (StrongView(), WeakView()):
        parameters = draw_some(view, range(8))
        assert_same(pickle.loads(pickle.dumps(parameters)), parameters)


# Cropping


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (50, 40, 32), (20, 31, 32), (200, 300, 48)])
def test_crop_equals_torchvisions(height: int, width: int, size: int) -> None:
    images = pictures(12, height, width)
    boxes = draw_some(WeakView(), range(12), size=(height, width)).boxes
    for image, box, cropped in zip(images, boxes.tolist(), crop(images, boxes, size), strict=True):
        expected = TF.resized_crop(image.float(), *box, size=[size, size], antialias=True)
        # The 8-bit kernel has 16-bit weights and rounds after each of its two passes.
        assert (cropped.float() - expected).abs().max() <= 1.1


def test_crop_accepts_images_of_any_size_and_layout() -> None:
    images = [*pictures(2, 40, 30), *pictures(2, 33, 90)]
    interleaved = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]
    boxes = draw(WeakView(), seed=0, epoch=0, ids=range(4), stream=0, sizes=[image.shape[1:] for image in images]).boxes
    together = crop(images, boxes, 32)
    assert torch.equal(
        together, torch.cat([crop([image], box[None], 32) for image, box in zip(images, boxes, strict=True)])
    )
    # Decoders deliver interleaved pixels, for which torch has another kernel.
    assert (together.int() - crop(interleaved, boxes, 32).int()).abs().max() <= 1


def test_shrink_scales_boxes_to_reduced_images() -> None:
    boxes = torch.tensor([[10, 20, 300, 400], [3, 5, 7, 7], [0, 0, 203, 301]])
    factors = torch.tensor([2, 1, 4])
    assert shrink(boxes, factors).tolist() == [[5, 10, 150, 200], [3, 5, 7, 7], [0, 0, 51, 75]]


@pytest.mark.parametrize("shape", [(32, 32), (40, 61), (61, 40), (31, 200), (9, 9)])
@pytest.mark.parametrize("resize", [32, 37])
def test_center_crop_equals_torchvisions(shape: tuple[int, int], resize: int) -> None:
    config = ViewsConfig(size=32, eval_resize=resize)
    image = pictures(3, *shape)[1]
    expected = TF.center_crop(TF.resize(image.float(), [resize], antialias=True), [32, 32])
    assert (center_crop([image], config)[0].float() - expected).abs().max() <= 1.1  # two roundings to 8 bits


@pytest.mark.parametrize(("shorter", "longer"), [(2, 300), (3, 96), (32, 1024), (8, 401), (64, 1000)])
@pytest.mark.parametrize("upright", [False, True])
def test_center_crop_of_elongated_images_equals_resizing_all_of_them(shorter: int, longer: int, upright: bool) -> None:
    image = pictures(1, longer, shorter)[0] if upright else pictures(1, shorter, longer)[0]
    height, width = (side * 32 // shorter for side in image.shape[1:])
    whole = torch.nn.functional.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    assert torch.equal(center_crop([image], ViewsConfig(size=32))[0], whole[:, top : top + 32, left : left + 32])


def test_center_crop_of_a_line_takes_no_memory_for_what_it_cuts_off() -> None:
    """Resized as a whole this image would have 10 million rows of 256 pixels: 7.7 GB."""
    assert center_crop([torch.zeros(3, 40_000, 1, dtype=torch.uint8)], ViewsConfig(size=224)).shape == (1, 3, 224, 224)


def test_center_crop_copies_an_image_of_the_right_size() -> None:
    image = pictures(2)[0]
    assert torch.equal(center_crop([image], ViewsConfig(size=32))[0], image)


def test_normalize_equals_torchvisions_in_any_layout() -> None:
    config = ViewsConfig(size=32)
    image = pictures(3)[1]
    expected = TF.normalize(image.float() / 255, list(config.mean), list(config.std))
    interleaved = image[None].contiguous(memory_format=torch.channels_last)
    for one in (image[None], interleaved, image[None].float() / 255):
        assert torch.allclose(normalize(one, config)[0], expected, atol=1e-6)  # a rounding of float32 near 2
    assert normalize(interleaved, config).is_contiguous(memory_format=torch.channels_last)


# Augmenting


@pytest.mark.parametrize("view", [StrongView(jitter=1, grayscale=0, blur=0, flip=0), StrongView(blur=0)])
def test_augment_equals_torchvisions(view: StrongView) -> None:
    crops = torch.stack(pictures(24))
    parameters = draw_some(view, range(24))
    config = ViewsConfig(size=32)
    found, expected = augment(crops, parameters, config), augment_one_by_one(crops, parameters, config)
    # A mean is rounded to 2^-17, pixel values to float32; four operations and the normalization by 0.22 amplify that.
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_weak_view_is_only_flipped_and_normalized() -> None:
    crops = torch.stack(pictures(8))
    parameters = draw_some(WeakView(), range(8))
    expected = torch.where(parameters.flip[:, None, None, None], crops.flip(3), crops)
    assert torch.equal(augment(crops, parameters, PLAIN), expected.float() / 255)
    assert torch.equal(augment_uint8(crops, parameters), expected)


@pytest.mark.parametrize("size", [32, 48])
def test_views_do_not_depend_on_the_batch_or_the_threads(size: int) -> None:
    images = pictures(40, size, size)
    config = PLAIN.model_copy(update={"size": size})
    parameters = draw_some(StrongView(), range(40), size=(size, size))
    threads = torch.get_num_threads()
    try:
        views = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            views.append(augment(crop(images, parameters.boxes, size), parameters, config))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])
    bytewise = augment_uint8(crop(images, parameters.boxes, size), parameters)
    for rows in ([0], [5], [39, 3], list(range(7, 24))):
        some = draw_some(StrongView(), rows, size=(size, size))
        crops = crop([images[row] for row in rows], some.boxes, size)
        assert torch.equal(augment(crops, some, config), views[0][rows])
        assert torch.equal(augment_uint8(crops, some), bytewise[rows])


def test_augment_changes_neither_the_crops_nor_global_random_states() -> None:
    crops, torch_state, numpy_state = torch.stack(pictures(4)), torch.get_rng_state(), np.random.get_state()[1].copy()
    before = crops.clone()
    augment(crops, draw_some(StrongView(), range(4)), PLAIN)
    assert torch.equal(crops, before)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_augment_ignores_autocast() -> None:
    crops, parameters = torch.stack(pictures(8)), draw_some(StrongView(), range(8))
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment(crops, parameters, PLAIN)
    assert torch.equal(inside, augment(crops, parameters, PLAIN))


def test_uint8_and_float_views_agree() -> None:
    crops, ids = torch.stack(pictures(256)), range(256)
    parameters = draw_some(StrongView(), ids)
    difference = augment_uint8(crops, parameters).float() - 255 * augment(crops, parameters, PLAIN)
    assert difference.abs().mean() < 0.75  # up to six roundings by 0.25 on average, and that of the hue
    assert difference.mean().abs() < 0.15  # no drift; the conversion to 8-bit hue loses a little
    assert difference.mean((1, 2, 3)).abs().max() < 1


def test_views_have_the_distribution_of_torchvisions_for_pillow_images() -> None:
    count, size = 1500, 32
    image = pictures(3, 40, 40)[1]
    view = StrongView()
    parameters = draw_some(view, range(count), size=(40, 40))
    crops = crop([image] * count, parameters.boxes, size)
    floats = augment(crops, parameters, PLAIN)
    transform = T.Compose(
        [
            T.RandomResizedCrop(size, view.crop_scale),
            T.RandomApply([T.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)], p=view.jitter),
            T.RandomGrayscale(view.grayscale),
            T.RandomApply([T.GaussianBlur(13, view.blur_sigma)], p=view.blur),
            T.RandomHorizontalFlip(view.flip),
            T.ToTensor(),
        ]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = torch.stack([transform(TF.to_pil_image(image)) for _ in range(count)])
    for views in (augment_uint8(crops, parameters).float() / 255, floats):
        for name, statistic in {
            "brightness": lambda view: view.mean((1, 2, 3)),
            "contrast": lambda view: view.mean(1).std((1, 2)),
            "saturation": lambda view: (view.amax(1) - view.amin(1)).mean((1, 2)),
            "hue": lambda view: (view[:, 0] - view[:, 2]).mean((1, 2)),
            "detail": lambda view: view.diff(dim=3).abs().mean((1, 2, 3)),
            "left to right": lambda view: (view[..., :16] - view[..., 16:]).mean((1, 2, 3)),
        }.items():
            assert largest_gap(statistic(views), statistic(expected)) < 1.95 * math.sqrt(2 / count), name


@pytest.mark.gpu
def test_augment_on_cuda_equals_the_cpu_without_synchronization() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    crops, parameters = torch.stack(pictures(64)), draw_some(StrongView(), range(64))
    crops_there, parameters_there = crops.to(device), parameters.to(device)
    augment(crops_there, parameters_there, PLAIN)  # initializes cuBLAS
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment(crops_there, parameters_there, PLAIN)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Fused multiply-adds may round a pixel to the next of the blur's 2048 steps, in each of the two passes.
    assert (found.cpu() - augment(crops, parameters, PLAIN)).abs().max() < 2 / 2048
