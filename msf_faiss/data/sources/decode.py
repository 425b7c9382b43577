"""Decode an encoded image, the image in a file, or that in a row of a table."""

import errno
import importlib
import io
import logging
import stat
import time
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from msf_faiss.data.source import Reduce, UnreadableImageError
from msf_faiss.data.sources.identify import describe, is_heif
from msf_faiss.data.sources.to_rgb import orientation, to_rgb

_COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # all have signatures

MAX_PIXELS = 178_956_970
"""Default of `data.max_pixels`: where Pillow refuses images too."""

_PAUSES = (0.1, 0.5, 2.0)  # seconds
_TRANSIENT = {
    getattr(errno, name, None)
    for name in (
        *("EAGAIN", "EBUSY", "EINTR", "EIO", "EREMOTEIO", "ESTALE", "ENFILE", "EMFILE", "ENOBUFS", "ENOMEM"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET"),
        *("ENETUNREACH", "ENOTCONN", "EPIPE", "ESHUTDOWN", "ETIMEDOUT"),
    )
} - {None}

Content = TypeVar("Content")

_log = logging.getLogger(__name__)

observer: ContextVar[Callable[[Image.Image, Callable[[], str]], None] | None] = ContextVar("observer", default=None)
"""Called with every image that is decoded, and its name, before its pixels are; see `sample`."""

# Pillow's own limit can neither name the file nor be set for one data set. Ours is checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


def decode_image(
    encoded: bytes, name: Callable[[], str], reduce: Reduce | None = None, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Decode to uint8 RGB [3, H, W] as `to_rgb` does: upright, at 8 bits, without transparency.

    Args:
        encoded: contents of an image file.
        name: returns the image's name for messages.
        reduce: see `Reduce`; called for JPEGs, with their upright height and width.
        max_pixels: refuse larger images.

    Raises:
        UnreadableImageError: if Pillow cannot read the image completely, or its samples have no known range.
    """
    try:
        with warnings.catch_warnings(action="ignore"), _open_image(encoded) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"it has {image.width:,} × {image.height:,} pixels, more than data.max_pixels ({max_pixels:,}); "
                    "raise that if memory allows"
                )
            if reduce is not None and image.format == "JPEG":
                _reduce(image, reduce)
            if (look := observer.get()) is not None:
                look(image, name)
            return to_rgb(image)
    except UnidentifiedImageError:
        problem = f"it is {describe(encoded)}"
    except Exception as error:  # decoders raise many types: OSError, SyntaxError, ValueError, struct.error, ...
        problem = f"{error or type(error).__name__}"
    raise unreadable(name(), problem)


def _open_image(encoded: bytes) -> Image.Image:
    """Let Pillow open an image, HEIC too where pillow-heif is installed. Pixels are not decoded yet.

    Raises:
        UnidentifiedImageError: if it has no format that Pillow knows.
        Exception: as Pillow's decoders raise for damaged headers.
    """
    if is_heif(encoded) and not reads_heif():
        raise UnidentifiedImageError
    return Image.open(io.BytesIO(encoded))


def reads_heif() -> bool:
    """Whether pillow-heif is installed; Pillow then reads HEIC."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def begins_like_image(path: Path) -> bool:
    """Whether a regular file has the header of an image, whatever its name."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with warnings.catch_warnings(action="ignore"), path.open("rb") as file:
            if is_heif(file.read(12)):
                return reads_heif()
            Image.open(file, formats=_COMMON).close()
    except Exception:  # decoders raise many types for damaged headers
        return False
    return True


def retry(read: Callable[[], Content]) -> Content:
    """Call `read`; again, after a pause, while a network or a disk fails in a way that often passes.

    Raises:
        OSError: the last one, or the first that does not pass by itself.
    """
    for pause in _PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
            _log.warning("%s; trying again in %g s", error, pause)
            time.sleep(pause)
    return read()


def _read_file(path: Path) -> bytes:
    """The contents of a regular file; a named pipe would be waited for.

    Raises:
        OSError: if it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    return path.read_bytes()


def decode_file(
    path: Path, name: Callable[[], str], reduce: Reduce | None = None, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Decode the image in a file; arguments as for `decode_image`.

    Raises:
        UnreadableImageError: if there is no such file or Pillow cannot read it.
    """
    try:
        encoded = retry(lambda: _read_file(path))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise unreadable(name(), getattr(error, "strerror", None) or str(error)) from error
    return decode_image(encoded, name, reduce, max_pixels)


def decode_record(
    encoded: bytes | None,
    path: str | None,
    folder: Path,
    name: Callable[[], str],
    reduce: Reduce | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Decode the image in a row of a table: `encoded`, or else the file at `path` in `folder`.

    Raises:
        UnreadableImageError: if the row has neither, or Pillow cannot read the image.
    """
    if encoded is not None:
        return decode_image(encoded, name, reduce, max_pixels)
    if path is None:
        raise unreadable(name(), "it has neither bytes nor a path")
    return decode_file(folder / path, name, reduce, max_pixels)


def unreadable(name: str, problem: str) -> UnreadableImageError:
    """The error for an image that cannot be decoded."""
    return UnreadableImageError(f"{name}: cannot read this image: {problem}")


def _reduce(image: Image.Image, reduce: Reduce) -> None:
    """Let the decoder reduce the image as far as `reduce` allows."""
    width, height = image.size
    on_its_side = orientation(image) in (5, 6, 7, 8)
    factor = reduce(width, height) if on_its_side else reduce(height, width)
    if factor > 1:
        image.draft(None, (width // factor, height // factor))
