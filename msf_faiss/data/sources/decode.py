"""Decoding of image files to tensors."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from msf_faiss.data.source import ReduceOne, UnreadableImageError

_SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def decode_image(encoded: bytes, name: Callable[[], str], reduce: ReduceOne | None = None) -> Tensor:
    """An encoded image as uint8 RGB [3, H, W], turned upright by its EXIF orientation; transparency is dropped.

    Args:
        encoded: a file's contents.
        name: what errors call the image.
        reduce: from height and width, upright, to how many times smaller than that they may come (`base.Reduce`). Only
            JPEGs do, of which a decoder has less to do the smaller they come.

    Raises:
        UnreadableImageError: naming `name()`, if it is not an image that Pillow reads completely.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if reduce is not None and image.format == "JPEG":
                _reduce(image, reduce)
            return to_rgb(image)
    except UnidentifiedImageError:
        problem = f"{len(encoded)} bytes that are no image of a known format" if encoded else "the file is empty"
    except Exception as error:  # decoders complain in many types: OSError, SyntaxError, ValueError, struct.error, ...
        problem = f"{error or type(error).__name__}"
    raise unreadable(name(), problem)


def unreadable(name: str, problem: str) -> UnreadableImageError:
    """The error for an image that cannot be had."""
    return UnreadableImageError(f"{name}: cannot read this image: {problem}")


def _reduce(image: Image.Image, reduce: ReduceOne) -> None:
    """Have the decoder make the image smaller, if `reduce` allows it."""
    width, height = image.size
    lies = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # on its side
    times = reduce(width, height) if lies else reduce(height, width)
    if times > 1:
        image.draft(None, (width // times, height // times))


def to_rgb(image: Image.Image) -> Tensor:
    """A PIL image as uint8 RGB [3, H, W], turned upright in place by its EXIF orientation.

    Raises:
        ValueError: if its pixels are floating-point numbers.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _SIXTEEN_BITS:  # convert() would cut values off at 255
        luma = np.asarray(image).astype(np.int64) >> 8
        return torch.from_numpy(np.repeat(luma.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)).permute(2, 0, 1)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns if it converts to RGB directly
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)
