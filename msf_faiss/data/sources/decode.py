"""Decode an encoded image, the image in a file, or that in a row of a table."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from msf_faiss.data.source import Reduce, UnreadableImageError

_SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def decode_image(encoded: bytes, name: Callable[[], str], reduce: Reduce | None = None) -> Tensor:
    """Decode to uint8 RGB [3, H, W], upright according to the EXIF orientation and without transparency.

    Args:
        encoded: contents of an image file.
        name: returns the image's name for messages.
        reduce: see `Reduce`; called for JPEGs, with their upright height and width.

    Raises:
        UnreadableImageError: if Pillow cannot read the image completely.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if reduce is not None and image.format == "JPEG":
                _reduce(image, reduce)
            return to_rgb(image)
    except UnidentifiedImageError:
        problem = f"{len(encoded)} bytes in no known image format" if encoded else "the file is empty"
    except Exception as error:  # decoders raise many types: OSError, SyntaxError, ValueError, struct.error, ...
        problem = f"{error or type(error).__name__}"
    raise unreadable(name(), problem)


def decode_file(path: Path, name: Callable[[], str], reduce: Reduce | None = None) -> Tensor:
    """Decode the image in a file; arguments as for `decode_image`.

    Raises:
        UnreadableImageError: if there is no such file or Pillow cannot read it.
    """
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise unreadable(name(), error.strerror or str(error)) from error
    return decode_image(encoded, name, reduce)


def decode_record(
    encoded: bytes | None, path: str | None, folder: Path, name: Callable[[], str], reduce: Reduce | None = None
) -> Tensor:
    """Decode the image in a row of a table: `encoded`, or else the file at `path` in `folder`.

    Raises:
        UnreadableImageError: if the row has neither, or Pillow cannot read the image.
    """
    if encoded is not None:
        return decode_image(encoded, name, reduce)
    if path is None:
        raise unreadable(name(), "it has neither bytes nor a path")
    return decode_file(folder / path, name, reduce)


def to_rgb(image: Image.Image) -> Tensor:
    """Convert a PIL image to uint8 RGB [3, H, W], after turning it upright in place by its EXIF orientation.

    Raises:
        ValueError: if its pixels are floating-point numbers.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _SIXTEEN_BITS:  # convert() would clip values at 255
        luma = np.asarray(image).astype(np.int64) >> 8
        return torch.from_numpy(np.repeat(luma.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)).permute(2, 0, 1)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns if it converts to RGB directly
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


def unreadable(name: str, problem: str) -> UnreadableImageError:
    """The error for an image that cannot be decoded."""
    return UnreadableImageError(f"{name}: cannot read this image: {problem}")


def _reduce(image: Image.Image, reduce: Reduce) -> None:
    """Let the decoder reduce the image as far as `reduce` allows."""
    width, height = image.size
    on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    factor = reduce(width, height) if on_its_side else reduce(height, width)
    if factor > 1:
        image.draft(None, (width // factor, height // factor))
