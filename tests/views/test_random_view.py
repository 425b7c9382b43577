"""Views: what is random is drawn by counters, and each operation equals torchvision's on single images.

There are two ways of finishing, a batch of floats at once and images of bytes one by one: see the two sections.
"""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from msf_faiss.config import StrongView, ViewsConfig, WeakView
from msf_faiss.views.random_view import (
    ONLINE,
    TARGET,
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
ALWAYS = StrongView(jitter=1, grayscale=0, blur=0, flip=0)
OFF = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


def pictures(count: int, height: int = 32, width: int = 32, *, seed: int = 0) -> list[Tensor]:
    """Smooth colour fields with noise, a grey one and a black one among them: uint8 [3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    fields = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    images = (fields + 0.1 * torch.randn(fields.shape, generator=generator)).mul(255).clamp(0, 255).to(torch.uint8)
    images[0] = images[0, :1]
    images[-1] = 0
    return list(images)


def drawn(
    view: WeakView, ids: range | list[int], *, size: tuple[int, int] = (32, 32), epoch: int = 3
) -> ViewParameters:
    return draw(view, seed=7, epoch=epoch, ids=ids, stream=ONLINE, sizes=[size] * len(ids))


def parts(parameters: ViewParameters) -> list[tuple[list[int], list[float]]]:
    """Rows and amounts of each position's hue shifts, of the grey and of the blurred images."""
    counts = list(parameters.counts)
    rows, amounts = parameters.rows.split(counts), parameters.amounts.split(counts)
    return [(row.tolist(), amount.tolist()) for row, amount in zip(rows, amounts, strict=True)]


def augment_one_by_one(crops: Tensor, parameters: ViewParameters, config: ViewsConfig) -> Tensor:
    """`augment` with torchvision's functions, image by image."""
    finished = []
    *hues, (gray_rows, _), (blur_rows, sigmas) = parts(parameters)
    for row, pixels in enumerate(crops):
        image = pixels.float() / 255
        if parameters.flip[row]:
            image = TF.horizontal_flip(image)
        for blend, (hue_rows, turns) in zip(parameters.blends, hues, strict=True):
            factor, mean_share, gray_share = blend[:, row].tolist()
            if row in hue_rows:
                image = TF.adjust_hue(image, turns[hue_rows.index(row)])
            elif mean_share:
                image = TF.adjust_contrast(image, factor)
            elif gray_share:
                image = TF.adjust_saturation(image, factor)
            else:
                image = TF.adjust_brightness(image, factor)
        if row in gray_rows:
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        if row in blur_rows:
            radius = min(math.ceil(3 * parameters.largest_sigma), image.shape[-1] - 1)
            image = TF.gaussian_blur(image, [2 * radius + 1] * 2, [sigmas[blur_rows.index(row)]] * 2)
        finished.append(TF.normalize(image, list(config.mean), list(config.std)))
    return torch.stack(finished)


def largest_gap(mine: Tensor, theirs: Tensor) -> float:
    """Kolmogorov and Smirnov's statistic of two samples of n values: beyond 1.95 * sqrt(2 / n) once in a thousand times
    if they are distributed alike. The seeds are fixed."""
    mine, theirs = mine.sort().values, theirs.sort().values
    points = torch.cat([mine, theirs])
    below = torch.searchsorted(mine, points, right=True) - torch.searchsorted(theirs, points, right=True)
    return float(below.abs().max()) / len(mine)


def assert_same(first: ViewParameters, second: ViewParameters) -> None:
    for one, other in zip(first[:5], second[:5], strict=True):
        assert torch.equal(one, other)
    assert first[5:] == second[5:]


# -- drawing


def test_a_sample_draws_the_same_in_any_batch() -> None:
    ids = list(range(300))
    together = drawn(StrongView(), ids)
    for row in (0, 1, 17, 299):
        alone = drawn(StrongView(), [row])
        assert torch.equal(alone.boxes[0], together.boxes[row])
        assert alone.flip[0] == together.flip[row]
        assert torch.equal(alone.blends[:, :, 0], together.blends[:, :, row])
        for (rows, amounts), (all_rows, all_amounts) in zip(parts(alone), parts(together), strict=True):
            assert amounts == [amount for here, amount in zip(all_rows, all_amounts, strict=True) if here == row]
            assert rows == [0] * len(amounts)


@pytest.mark.parametrize("change", [{"seed": 8}, {"epoch": 4}, {"stream": TARGET}, {"ids": range(100, 200)}])
def test_every_counter_changes_the_draw(change: dict[str, object]) -> None:
    usual: dict[str, object] = {"seed": 7, "epoch": 3, "stream": ONLINE, "ids": range(100), "sizes": [(64, 64)] * 100}
    first = draw(WeakView(), **usual)  # type: ignore[arg-type]
    second = draw(WeakView(), **usual | change)  # type: ignore[arg-type]
    assert (first.boxes == second.boxes).all(1).sum() <= 2  # equal only by chance: some 10^5 boxes are possible
    assert 20 < (first.flip == second.flip).sum() < 80  # 50 ± 5, six deviations


def test_no_global_random_state_is_touched() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    images = pictures(8)
    parameters = drawn(StrongView(), range(8))
    augment(crop(images, parameters.boxes, 32), parameters, PLAIN)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize(
    ("size", "scale"), [((64, 48), (0.2, 1.0)), ((224, 224), (0.08, 1.0)), ((30, 200), (0.4, 0.9))]
)
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int], scale: tuple[float, float]) -> None:
    count = 4000
    boxes = drawn(WeakView(crop_scale=scale), range(count), size=size).boxes.double()
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


def test_boxes_stay_inside_and_odd_shapes_get_a_central_crop() -> None:
    sizes = [(1, 1), (1, 500), (500, 1), (7, 300), (300, 7), (33, 32), (2, 2), (4000, 3000)] * 50
    boxes = draw(WeakView(), seed=0, epoch=0, ids=range(400), stream=0, sizes=sizes).boxes
    top, left, height, width = boxes.T
    whole = torch.tensor(sizes)
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] >= 0).all()
    assert (top + height <= whole[:, 0]).all()
    assert (left + width <= whole[:, 1]).all()
    assert boxes[1].tolist() == [0, 249, 1, 1]  # torchvision's fallback: whole height, 4:3, centred
    assert boxes[3].tolist() == [0, 145, 7, 9]


def test_every_place_of_a_box_is_equally_likely() -> None:
    top, _, height, _ = drawn(WeakView(crop_scale=(0.8, 1)), range(4000)).boxes.T
    places = top[height == 30].bincount(minlength=3) / (height == 30).sum()
    assert len(places) == 3
    assert (places - 1 / 3).abs().max() < 0.12  # five deviations of a share of 400
    assert (height == 30).sum() > 400


def test_shares_and_factors_follow_the_config() -> None:
    count = 4000
    view = StrongView(
        flip=0.3, jitter=0.6, brightness=0.5, contrast=0.2, saturation=0.7, hue=0.25, blur_sigma=(0.5, 1.5)
    )
    parameters = drawn(view, range(count))
    *hues, (gray_rows, _), (blur_rows, sigmas) = parts(parameters)
    for share, expected in [
        (parameters.flip.float().mean(), 0.3),
        (len(gray_rows) / count, 0.2),
        (len(blur_rows) / count, 0.5),
        (sum(len(rows) for rows, _ in hues) / count, 0.6),
        *((len(rows) / count, 0.15) for rows, _ in hues),  # each operation is equally often first, second, ...
    ]:
        assert share == pytest.approx(expected, abs=0.04)  # five deviations of a share of 4000
    turns = torch.tensor([turn for _, amounts in hues for turn in amounts])
    assert -0.25 <= turns.min() < -0.24 < 0.24 < turns.max() <= 0.25
    assert 0.5 <= min(sigmas) < 0.51 < 1.49 < max(sigmas) <= 1.5
    factor, mean_share, gray_share = parameters.blends.unbind(1)  # [4, count] each
    for rows, strength in [(mean_share != 0, 0.2), (gray_share != 0, 0.7)]:
        assert rows.sum(0).max() == 1
        assert rows.any(0).float().mean() == pytest.approx(0.6, abs=0.04)
        assert 1 - strength <= factor[rows].min() < 1 - 0.9 * strength
        assert 1 + 0.9 * strength < factor[rows].max() <= 1 + strength + 1e-6  # float32 holds 1.2 as 1.2000000477


# -- crops


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (50, 40, 32), (20, 31, 32), (200, 300, 48)])
def test_crop_equals_torchvisions(height: int, width: int, size: int) -> None:
    images = pictures(12, height, width)
    boxes = drawn(WeakView(), range(12), size=(height, width)).boxes
    crops = crop(images, boxes, size)
    for image, box, cropped in zip(images, boxes.tolist(), crops, strict=True):
        expected = TF.resized_crop(image.float(), *box, size=[size, size], antialias=True)
        # The 8-bit kernel has 16-bit weights and rounds after each of its two passes.
        assert (cropped.float() - expected).abs().max() <= 1.1


def test_crop_takes_images_of_any_size_and_layout() -> None:
    images = [*pictures(2, 40, 30), *pictures(2, 33, 90)]
    interleaved = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]
    boxes = draw(WeakView(), seed=0, epoch=0, ids=range(4), stream=0, sizes=[image.shape[1:] for image in images]).boxes
    together = crop(images, boxes, 32)
    assert torch.equal(
        together, torch.cat([crop([image], box[None], 32) for image, box in zip(images, boxes, strict=True)])
    )
    # Decoders give interleaved pixels, for which torch has another kernel.
    assert (together.int() - crop(interleaved, boxes, 32).int()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(32, 32), (40, 61), (61, 40), (31, 200), (9, 9)])
@pytest.mark.parametrize("resize", [32, 37])
def test_center_crop_equals_torchvisions(shape: tuple[int, int], resize: int) -> None:
    config = ViewsConfig(size=32, eval_resize=resize)
    image = pictures(3, *shape)[1]
    expected = TF.center_crop(TF.resize(image.float(), [resize], antialias=True), [32, 32])
    assert (center_crop([image], config)[0].float() - expected).abs().max() <= 1.1  # two roundings to 8 bits


def test_center_crop_leaves_an_image_of_the_right_size_alone() -> None:
    image = pictures(2)[0]
    assert torch.equal(center_crop([image], ViewsConfig(size=32))[0], image)


def test_normalize() -> None:
    config = ViewsConfig(size=32)
    image = pictures(3)[1]
    expected = TF.normalize(image.float() / 255, list(config.mean), list(config.std))
    interleaved = image[None].contiguous(memory_format=torch.channels_last)
    for one in (image[None], interleaved, image[None].float() / 255):
        assert torch.allclose(normalize(one, config)[0], expected, atol=1e-6)  # a rounding of float32 near 2
    assert normalize(interleaved, config).is_contiguous(memory_format=torch.channels_last)


def test_shrink_scales_boxes_to_reduced_images() -> None:
    boxes = torch.tensor([[10, 20, 300, 400], [3, 5, 7, 7], [0, 0, 203, 301]])
    factors = torch.tensor([2, 1, 4])
    assert shrink(boxes, factors).tolist() == [[5, 10, 150, 200], [3, 5, 7, 7], [0, 0, 51, 75]]


# -- augmenting


@pytest.mark.parametrize(
    "view",
    [
        ALWAYS.model_copy(update=OFF | {"brightness": 0.9}),
        ALWAYS.model_copy(update=OFF | {"contrast": 0.9}),
        ALWAYS.model_copy(update=OFF | {"saturation": 0.9}),
        ALWAYS.model_copy(update=OFF | {"hue": 0.5}),
        ALWAYS.model_copy(update=OFF | {"flip": 1}),
        ALWAYS.model_copy(update=OFF | {"grayscale": 1}),
        ALWAYS,
        StrongView(blur=0),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "flip", "grayscale", "jitter", "all"],
)
def test_augment_equals_torchvisions(view: StrongView) -> None:
    crops = torch.stack(pictures(24))
    parameters = drawn(view, range(24))
    config = ViewsConfig(size=32)
    found, expected = augment(crops, parameters, config), augment_one_by_one(crops, parameters, config)
    # A mean is rounded to 2^-17, pixel values to float32, and four operations and the deviation (.22) amplify it.
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("size", [8, 9, 32, 33])
@pytest.mark.parametrize("sigma", [(0.1, 2.0), (0.01, 0.02), (3.0, 4.0)])
def test_blur_equals_torchvisions(size: int, sigma: tuple[float, float]) -> None:
    crops = torch.stack(pictures(8, size, size))
    parameters = drawn(ALWAYS.model_copy(update=OFF | {"blur": 1, "blur_sigma": sigma}), range(8))
    config = PLAIN.model_copy(update={"size": size})
    found, expected = augment(crops, parameters, config), augment_one_by_one(crops, parameters, config)
    assert (found - expected).abs().max() < 1 / 255  # pixels and weights have 11 bits in the blur
    steps = found * 2**22
    assert torch.equal(steps, steps.round())  # exact sums of products of 11 bits, in whatever order they were added


def test_a_weak_view_is_flipped_and_normalised_only() -> None:
    crops = torch.stack(pictures(8))
    parameters = drawn(WeakView(), range(8))
    expected = torch.where(parameters.flip[:, None, None, None], crops.flip(3), crops).float() / 255
    assert torch.equal(augment(crops, parameters, PLAIN), expected)


@pytest.mark.parametrize("size", [32, 48])
def test_a_view_does_not_depend_on_the_batch_or_the_threads(size: int) -> None:
    images = pictures(40, size, size)
    config = PLAIN.model_copy(update={"size": size})
    parameters = drawn(StrongView(), range(40), size=(size, size))
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
    for rows in ([0], [5], [39, 3], list(range(7, 24))):
        some = drawn(StrongView(), rows, size=(size, size))
        again = augment(crop([images[row] for row in rows], some.boxes, size), some, config)
        assert torch.equal(again, views[0][rows])


def test_parameters_survive_pickling() -> None:
    parameters = drawn(StrongView(), range(8))
    assert_same(pickle.loads(pickle.dumps(parameters)), parameters)
    assert_same(pickle.loads(pickle.dumps(drawn(WeakView(), range(8)))), drawn(WeakView(), range(8)))


def test_augment_leaves_the_crops_alone() -> None:
    crops = torch.stack(pictures(4))
    before = crops.clone()
    augment(crops, drawn(StrongView(), range(4)), PLAIN)
    assert torch.equal(crops, before)


def test_autocast_around_it_changes_nothing() -> None:
    crops, parameters = torch.stack(pictures(8)), drawn(StrongView(), range(8))
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment(crops, parameters, PLAIN)
    assert torch.equal(inside, augment(crops, parameters, PLAIN))


# -- the same in 8 bits


def retouched(crops: Tensor, parameters: ViewParameters) -> Tensor:
    """Of `crops` [B, 3, S, S] uint8, in any layout: a new tensor."""
    result = crops.contiguous(memory_format=torch.channels_last)
    result = result.clone(memory_format=torch.channels_last) if result is crops else result
    augment_uint8_(result, parameters)
    return result


@pytest.mark.parametrize(
    ("change", "most", "mean"),
    [
        ({"brightness": 0.9}, 0.55, 0.3),  # one rounding to 8 bits, .25 in the mean
        ({"contrast": 0.9}, 0.55, 0.3),
        ({"saturation": 0.9}, 1.0, 0.35),  # and the grey was rounded before it
        # A hue of 8 bits has 42.7 steps a sixth of the circle, on which a channel runs through up to 255 values; the
        # hue and its shift are off by half a step each.
        ({"hue": 0.5}, 12, 0.6),
        ({"flip": 1}, 0, 0),
        ({"grayscale": 1}, 0.55, 0.3),
        ({"blur": 1}, 2.5, 0.35),  # weights are rounded to 1/256
        ({"blur": 1, "blur_sigma": (3.0, 4.0)}, 4, 0.6),
        ({"blur": 1, "blur_sigma": (0.01, 0.02)}, 0, 0),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "flip", "grayscale", "blur", "wide blur", "narrow blur"],
)
@pytest.mark.parametrize("size", [9, 32])
def test_each_operation_in_8_bits_equals_torchvisions(
    size: int, change: dict[str, object], most: float, mean: float
) -> None:
    crops = torch.stack(pictures(24, size, size))
    parameters = drawn(ALWAYS.model_copy(update=OFF | change), range(24))
    config = PLAIN.model_copy(update={"size": size})
    off = (retouched(crops, parameters) - 255 * augment_one_by_one(crops, parameters, config)).abs()
    assert off.max() <= most
    assert off.mean() <= mean


def test_whole_views_in_8_bits_equal_those_of_floats() -> None:
    crops, ids = torch.stack(pictures(256)), range(256)
    parameters = drawn(StrongView(), ids)
    bytewise, floats = retouched(crops, parameters).float(), 255 * augment(crops, parameters, PLAIN)
    assert (bytewise - floats).abs().mean() < 0.75  # up to six roundings of .25 in the mean, and the hue's
    assert (bytewise - floats).mean().abs() < 0.15  # no drift; the hue's conversions lose a little
    assert (bytewise.mean((1, 2, 3)) - floats.mean((1, 2, 3))).abs().max() < 1  # of any image


def test_views_are_distributed_as_torchvisions_of_pillow_images() -> None:
    count, size = 1500, 32
    image = pictures(3, 40, 40)[1]
    view = StrongView()
    parameters = drawn(view, range(count), size=(40, 40))
    crops = crop([image] * count, parameters.boxes, size)
    floats = augment(crops, parameters, PLAIN)
    augment_uint8_(crops, parameters)
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
        theirs = torch.stack([transform(TF.to_pil_image(image)) for _ in range(count)])
    for views in (crops.float() / 255, floats):
        for name, statistic in {
            "brightness": lambda view: view.mean((1, 2, 3)),
            "contrast": lambda view: view.mean(1).std((1, 2)),
            "saturation": lambda view: (view.amax(1) - view.amin(1)).mean((1, 2)),
            "hue": lambda view: (view[:, 0] - view[:, 2]).mean((1, 2)),
            "detail": lambda view: view.diff(dim=3).abs().mean((1, 2, 3)),
            "left to right": lambda view: (view[..., :16] - view[..., 16:]).mean((1, 2, 3)),
        }.items():
            assert largest_gap(statistic(views), statistic(theirs)) < 1.95 * math.sqrt(2 / count), name


def test_a_view_in_8_bits_does_not_depend_on_the_batch() -> None:
    crops = torch.stack(pictures(40, 48, 48))
    together = retouched(crops, drawn(StrongView(), range(40)))
    for rows in ([0], [5], [39, 3], list(range(7, 24))):
        assert torch.equal(retouched(crops[rows], drawn(StrongView(), rows)), together[rows])


@pytest.mark.gpu
def test_augment_on_cuda_equals_the_cpu_and_never_waits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    crops, parameters = torch.stack(pictures(64)), drawn(StrongView(), range(64))
    on_device, parameters_there = crops.to(device), parameters.to(device)
    augment(on_device, parameters_there, PLAIN)  # starts cuBLAS
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment(on_device, parameters_there, PLAIN)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Fused multiply-adds may round a pixel to the other 11-bit step in the blur, once each way.
    assert (found.cpu() - augment(crops, parameters, PLAIN)).abs().max() < 2 / 2048
