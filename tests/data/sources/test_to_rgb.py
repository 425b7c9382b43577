"""Depth, sign, photometric interpretation, transparency and orientation, each as the file says."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiff import RGB, WHITE_IS_ZERO, tiff

from msf_faiss.data.sources import to_rgb as module
from msf_faiss.data.sources.to_rgb import BACKGROUND, ignored_content

STEPS = 17


def ramp(largest: int, dtype: type[np.generic]) -> NDArray[np.generic]:
    """From 0 to full scale: [2, 17]."""
    return np.linspace(0, largest, STEPS).round().astype(dtype)[None].repeat(2, axis=0)


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """[H, W, 3]."""
    return module.to_rgb(image).permute(1, 2, 0).numpy()


def opened(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "file",
    [
        tiff(ramp(255, np.uint8)),
        tiff(ramp(127, np.int8)),
        tiff(ramp(4095, np.uint16), bits=12),
        tiff(ramp(65535, np.uint16)),
        tiff(ramp(65535, np.uint16), order=">"),
        tiff(ramp(32767, np.int16)),
        tiff(ramp(32767, np.int16), order=">"),
        encoded(Image.fromarray(ramp(65535, np.uint16))),
        b"P5 17 2 1023\n" + ramp(1023, np.uint16).astype(">u2").tobytes(),
        encoded(Image.fromarray(ramp(65535, np.uint16)), "JPEG2000", irreversible=False),
    ],
    ids=["u8", "i8", "u12", "u16", "u16 big-endian", "i16", "i16 big-endian", "PNG 16", "PGM 1023", "JP2 16"],
)
def test_a_ramp_to_full_scale_spans_8_bits(file: bytes) -> None:
    pixels = to_rgb(opened(file))
    assert pixels.shape == (2, STEPS, 3)
    # Truncation to the top bits and rounding differ by one, and so do signed bytes, which have 7 bits.
    assert np.abs(pixels.astype(int) - np.linspace(0, 255, STEPS).round()[None, :, None]).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_is_inverted_at_any_depth(dtype: type[np.generic]) -> None:
    straight = to_rgb(opened(tiff(ramp(np.iinfo(dtype).max, dtype))))
    inverted = to_rgb(opened(tiff(ramp(np.iinfo(dtype).max, dtype), photometric=WHITE_IS_ZERO)))
    assert np.array_equal(inverted, 255 - straight)


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        (tiff(ramp(255, np.int32)), "32-bit integers of unknown range"),
        (tiff(ramp(255, np.uint32)), "32-bit integers of unknown range"),
        (tiff(ramp(1, np.float32)), "floating-point numbers of unknown range"),
        (tiff(-ramp(127, np.int8)), "some negative"),  # type: ignore[operator]
        (tiff(-ramp(32767, np.int16)), "some negative"),  # type: ignore[operator]
    ],
    ids=["i32", "u32", "f32", "negative i8", "negative i16"],
)
def test_an_unknown_range_is_refused(file: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        to_rgb(opened(file))


def icon(mode: str, color: int) -> Image.Image:
    """A square of one gray on transparency, whose transparent pixels hold noise."""
    noise = np.random.default_rng(color).integers(0, 256, (8, 8, 4), np.uint8)
    noise[..., 3] = 0
    noise[2:6, 2:6] = (color, color, color, 255)
    return Image.fromarray(noise).convert(mode) if mode != "P" else Image.fromarray(noise).quantize(64)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("color", [0, 255])
def test_transparency_shows_the_background(mode: str, color: int) -> None:
    pixels = to_rgb(opened(encoded(icon(mode, color))))
    expected = np.full((8, 8, 3), BACKGROUND, np.uint8)
    expected[2:6, 2:6] = color
    assert np.abs(pixels.astype(int) - expected).max() <= (8 if mode == "P" else 0)  # 64 colors are not exact


def test_half_transparent_pixels_are_mixed_with_the_background() -> None:
    pixels = to_rgb(Image.new("RGBA", (1, 1), (255, 0, BACKGROUND, 128)))
    assert np.abs(pixels[0, 0].astype(int) - [192, 64, BACKGROUND]).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_color_key_is_transparent(dtype: type[np.generic]) -> None:
    gray = ramp(np.iinfo(dtype).max, dtype)
    pixels = to_rgb(opened(encoded(Image.fromarray(gray), transparency=int(gray[0, -1]))))
    assert pixels[0, [0, -1], 0].tolist() == [0, BACKGROUND]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_turned_upright(format: str, orientation: int) -> None:
    gray = np.repeat(np.repeat(np.array([[0, 80, 160], [240, 120, 40]], np.uint8), 16, axis=0), 16, axis=1)
    turned = [
        gray,
        gray[:, ::-1],
        gray[::-1, ::-1],
        gray[::-1],
        gray.T,
        np.rot90(gray, 1),
        gray[::-1, ::-1].T,
        np.rot90(gray, -1),
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turned[orientation - 1]))
    pixels = to_rgb(opened(encoded(stored, format, exif=exif)))
    assert np.abs(pixels[..., 0].astype(int) - gray).max() < 30  # JPEG and WebP are lossy


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II",
        # XResolution as ASCII; a negative rational in an unsigned tag; both beside an orientation
        b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x1a\x01\x02\0\x03\0\0\x0072\0\0\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x88\x25\0\x04\0\0\0\x01\xff\xff\xff\xff\0\0\0\0",
    ],
    ids=["garbage", "truncated", "ASCII resolution", "pointer beyond the end"],
)
def test_a_damaged_exif_block_does_not_cost_the_image(format: str, block: bytes) -> None:
    image = opened(encoded(Image.fromarray(ramp(255, np.uint8)), format, exif=block))
    assert to_rgb(image).shape in ((2, STEPS, 3), (STEPS, 2, 3))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (tiff(np.zeros((2, 2, 4), np.uint8), photometric=RGB, extra=[0]), "only the first 3 bands are used"),
        (tiff(np.zeros((2, 2, 5), np.uint8), photometric=RGB, extra=[0, 0]), "only the first 3 bands are used"),
        (tiff(np.zeros((2, 2, 2), np.uint8), extra=[0]), "only the first band is used"),
        (tiff(np.zeros((2, 2, 4), np.uint8), photometric=RGB, extra=[2]), None),
        (tiff(np.zeros((2, 2, 3), np.uint8), photometric=RGB), None),
        (
            encoded(Image.new("L", (2, 2)), "TIFF", save_all=True, append_images=[Image.new("L", (2, 2), 9)]),
            "only the first of 2 pages is used",
        ),
        (
            encoded(Image.new("L", (2, 2)), "GIF", save_all=True, append_images=[Image.new("L", (2, 2), 9)]),
            "only the first of 2 frames is used",
        ),
    ],
    ids=["RGB + NIR", "5 bands", "gray + band", "RGBA", "RGB", "stack", "animation"],
)
def test_ignored_content_is_named(file: bytes, content: str | None) -> None:
    assert ignored_content(opened(file)) == content
