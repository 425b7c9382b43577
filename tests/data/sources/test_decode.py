"""Decoding: any mode becomes 8-bit RGB, any damage an error that names the image."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from msf_faiss.data.source import UnreadableImageError
from msf_faiss.data.sources.decode import decode_image

RAMP = (np.arange(12 * 7).reshape(7, 12) * 3).astype(np.uint8)  # [7, 12]


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> torch.Tensor:
    return decode_image(data, lambda: "photo 17")


def test_rgb_is_exact_and_channels_come_first() -> None:
    pixels = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=2)
    found = decode(encoded(Image.fromarray(pixels)))
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(RAMP).convert("RGB").convert(mode)
    found = decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert found.shape == (3, 7, 12)
    assert torch.equal(found, torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def test_a_palette_with_transparency() -> None:
    palette = Image.fromarray(RAMP).convert("P")
    assert decode(encoded(palette, transparency=bytes(range(256)))).shape == (3, 7, 12)


def test_sixteen_bits_are_scaled_rather_than_cut_off() -> None:
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert torch.equal(decode(encoded(deep)), torch.from_numpy(RAMP).expand(3, -1, -1))


def test_exif_orientation_turns_it_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be rotated by 90° clockwise
    found = decode(encoded(Image.fromarray(RAMP), exif=exif))
    assert torch.equal(found[0], torch.from_numpy(np.rot90(RAMP, -1).copy()))


def photo(height: int, width: int, **options: object) -> bytes:
    """A JPEG of smooth colours."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    return encoded(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), "JPEG", **options)


@pytest.mark.parametrize(("times", "size"), [(1, (203, 301)), (2, (102, 151)), (4, (51, 76)), (8, (26, 38))])
def test_a_jpeg_can_come_smaller(times: int, size: tuple[int, int]) -> None:
    def reduce(height: int, width: int) -> int:
        assert (height, width) == (203, 301)
        return times

    whole, small = decode(photo(203, 301)), decode_image(photo(203, 301), lambda: "photo 17", reduce)
    assert small.shape[1:] == size
    mean = torch.nn.functional.avg_pool2d(whole.float(), times, ceil_mode=True)
    # Each pixel stands for the mean of a block; the decoder takes the lowest frequencies instead, of chroma too.
    assert (small - mean).abs().mean() < 2


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}], ids=["progressive", "full chroma"])
def test_any_kind_of_jpeg_can_come_smaller(mode: str, options: dict[str, object]) -> None:
    data = encoded(Image.fromarray(RAMP).convert("RGB").convert(mode), "JPEG", **options)
    assert decode_image(data, lambda: "photo 17", lambda *_: 2).shape == (3, 4, 6)


def test_a_reduced_jpeg_is_upright_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data, asked = photo(200, 300, exif=exif), []
    small = decode_image(data, lambda: "photo 17", lambda *size: asked.append(size) or 2)
    assert asked == [(300, 200)]
    assert small.shape == (3, 150, 100)


def test_only_jpegs_are_reduced() -> None:
    assert decode_image(encoded(Image.fromarray(RAMP)), lambda: "photo 17", lambda *_: 8).shape == (3, 7, 12)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "the file is empty"),
        (b"plain text", "10 bytes that are no image of a known format"),
        (encoded(Image.fromarray(RAMP), "JPEG")[:-60], "truncated"),
        (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "floating-point"),
    ],
    ids=["empty", "text", "truncated", "float"],
)
def test_damage_names_the_image(data: bytes, complaint: str) -> None:
    with pytest.raises(UnreadableImageError, match=rf"^photo 17: cannot read.*(?i:{complaint})"):
        decode(data)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UnreadableImageError, match=r"photo 17.*decompression bomb"):
        decode(encoded(Image.fromarray(RAMP)))
