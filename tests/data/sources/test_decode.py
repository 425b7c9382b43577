from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msf_faiss.data.source import UnreadableImageError
from msf_faiss.data.sources import decode as decode_module
from msf_faiss.data.sources.decode import decode_file, decode_image, decode_record, retry

RAMP = (np.arange(12 * 7).reshape(7, 12) * 3).astype(np.uint8)  # [7, 12]


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> torch.Tensor:
    return decode_image(data, lambda: "photo 17")


def test_rgb_images_are_decoded_exactly() -> None:
    pixels = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=2)
    found = decode(encoded(Image.fromarray(pixels)))
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_other_modes_are_converted_to_rgb(mode: str) -> None:
    image = Image.fromarray(RAMP).convert("RGB").convert(mode)
    found = decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert found.shape == (3, 7, 12)
    assert torch.equal(found, torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def photo(height: int, width: int, **options: object) -> bytes:
    """A JPEG of smooth colours."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    return encoded(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), "JPEG", **options)


@pytest.mark.parametrize(("factor", "size"), [(1, (203, 301)), (2, (102, 151)), (4, (51, 76)), (8, (26, 38))])
def test_jpegs_are_reduced(factor: int, size: tuple[int, int]) -> None:
    def reduce(height: int, width: int) -> int:
        assert (height, width) == (203, 301)
        return factor

    whole, small = decode(photo(203, 301)), decode_image(photo(203, 301), lambda: "photo 17", reduce)
    assert small.shape[1:] == size
    mean = torch.nn.functional.avg_pool2d(whole.float(), factor, ceil_mode=True)
    # Not exactly the mean of each block: the decoder uses its lowest frequencies, also of chroma.
    assert (small - mean).abs().mean() < 2


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}], ids=["progressive", "full chroma"])
def test_every_kind_of_jpeg_is_reduced(mode: str, options: dict[str, object]) -> None:
    data = encoded(Image.fromarray(RAMP).convert("RGB").convert(mode), "JPEG", **options)
    assert decode_image(data, lambda: "photo 17", lambda *_: 2).shape == (3, 4, 6)


def test_exif_orientation_is_applied_to_reduced_jpegs() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data, calls = photo(200, 300, exif=exif), []
    small = decode_image(data, lambda: "photo 17", lambda *size: calls.append(size) or 2)
    assert calls == [(300, 200)]
    assert small.shape == (3, 150, 100)


def test_other_formats_are_not_reduced() -> None:
    assert decode_image(encoded(Image.fromarray(RAMP)), lambda: "photo 17", lambda *_: 8).shape == (3, 7, 12)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "it is an empty file"),
        (b"plain text", "10 bytes in no known image format"),
        (encoded(Image.fromarray(RAMP), "JPEG")[:-60], "truncated"),
        (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "floating-point"),
    ],
    ids=["empty", "text", "truncated", "float"],
)
def test_damaged_images_are_named(data: bytes, complaint: str) -> None:
    with pytest.raises(UnreadableImageError, match=rf"^photo 17: cannot read.*(?i:{complaint})"):
        decode(data)


def test_an_image_above_the_limit_is_refused_with_the_setting() -> None:
    data = encoded(Image.fromarray(RAMP))
    assert decode_image(data, lambda: "photo 17", max_pixels=84).shape == (3, 7, 12)
    with pytest.raises(UnreadableImageError, match=r"photo 17.*12 × 7 pixels, more than data.max_pixels \(83\)"):
        decode_image(data, lambda: "photo 17", max_pixels=83)


def test_an_image_above_pillows_own_limit_decodes_without_a_warning() -> None:
    """Pillow warns of 89 million pixels, and refuses 179 million."""
    data = encoded(Image.new("1", (16_000, 12_000)))
    assert decode_image(data, lambda: "photo 17", max_pixels=200_000_000).shape == (3, 12_000, 16_000)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "photo.jpg")
    with pytest.raises(UnreadableImageError, match="not a regular file"):
        decode_file(tmp_path / "photo.jpg", lambda: "photo.jpg")


def test_decode_record_takes_the_bytes_or_else_the_file(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(RAMP))
    (tmp_path / "17.png").write_bytes(data)
    for found in (
        decode_file(tmp_path / "17.png", lambda: "photo 17"),
        decode_record(data, "gone.png", tmp_path, lambda: "photo 17"),
        decode_record(None, "17.png", tmp_path, lambda: "photo 17"),
    ):
        assert torch.equal(found, decode(data))
    for path, problem in (("gone.png", "No such file"), (None, "it has neither bytes nor a path")):
        with pytest.raises(UnreadableImageError, match=f"photo 17: cannot read this image: {problem}"):
            decode_record(None, path, tmp_path, lambda: "photo 17")


@pytest.mark.parametrize(
    ("number", "failures", "attempts"),
    [
        (errno.EIO, 2, 3),
        (errno.ESTALE, 3, 4),
        (errno.ENOTCONN, 1, 2),
        (errno.ETIMEDOUT, 9, 4),  # it does not pass
        (errno.ENOENT, 1, 1),
        (errno.EACCES, 1, 1),
    ],
)
def test_transient_errors_are_retried(
    monkeypatch: pytest.MonkeyPatch, number: int, failures: int, attempts: int
) -> None:
    monkeypatch.setattr(decode_module, "_PAUSES", (0.0, 0.0, 0.0))
    called = []

    def read() -> bytes:
        called.append(1)
        if len(called) <= failures:
            raise OSError(number, os.strerror(number))
        return b"content"

    if failures < attempts:
        assert retry(read) == b"content"
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            retry(read)
    assert len(called) == attempts
