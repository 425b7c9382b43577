"""From an image that Pillow has opened to 8-bit RGB: bit depth, sign, transparency and orientation.

Pillow keeps deeper samples as the file has them and says nothing of their range, so the range is read from the file:
a sample of b unsigned bits spans 0 .. 2^b - 1, one of b signed bits 0 .. 2^(b-1) - 1.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    TiffImageFile,
)
from torch import Tensor

BACKGROUND = 128
"""Each channel of the color behind transparent pixels: medium gray, so that black and white icons stay visible."""

DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")  # formats whose deep samples Pillow scales to 0 .. 65,535
_SIGNED = 2  # of TIFF's SampleFormat
_WHITE_IS_ZERO, _RGB = 0, 2  # of TIFF's PhotometricInterpretation
_UNSPECIFIED = 0  # of TIFF's ExtraSamples
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Tensor:
    """The pixels of `image`, upright: uint8 [3, H, W].

    Raises:
        ValueError: if the range of its samples is unknown (floating point, 32-bit integers, negative values).
        Exception: whatever Pillow's decoders raise for damaged data.
    """
    image.load()
    method = _TRANSPOSE.get(orientation(image))
    deep = _deep_luma(image)
    if deep is not None:
        image = Image.fromarray(deep)
    elif _used_bands(image):
        image = image.convert("RGB")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
        image = Image.alpha_composite(background, rgba)
    if method is not None:
        image = image.transpose(method)
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # [H, W, 3], writable
    return torch.from_numpy(pixels).permute(2, 0, 1)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is damaged.

    Nothing else of the block is read: a bad tag in it must not cost the image.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # SyntaxError, struct.error and others, depending on the damage
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def full_scale(image: Image.Image) -> int:
    """The largest value that samples of a deep image can have.

    Raises:
        ValueError: if the file does not say.
    """
    if isinstance(image, TiffImageFile):
        bits, signed = _tag(image, BITSPERSAMPLE, 1), _is_signed(image)
        if bits <= 16:
            return (1 << (bits - signed)) - 1
        raise ValueError(f"its samples are {bits}-bit integers of unknown range; convert them to 8 or 16 bits")
    if image.format in _SIXTEEN_BITS:
        return 0xFFFF
    raise ValueError(f"its samples are integers of unknown range ({image.format}); convert them to 8 or 16 bits")


def ignored_content(image: Image.Image) -> str | None:
    """What of a readable file `to_rgb` leaves out: pages after the first, bands without a meaning. None: nothing."""
    if image.format != "MPO" and getattr(image, "is_animated", False):  # an MPO is a photo with its preview
        unit = "pages" if image.format == "TIFF" else "frames"
        return f"only the first of {getattr(image, 'n_frames', 'several')} {unit} is used"
    if used := _used_bands(image):
        return "only the first 3 bands are used" if used == 3 else "only the first band is used"
    return None


def _deep_luma(image: Image.Image) -> NDArray[np.uint8] | None:
    """The top 8 bits of deep or signed gray samples, [H, W]; None: the image has neither."""
    signed = _is_signed(image)
    if image.mode == "F":
        raise ValueError("its samples are floating-point numbers of unknown range; convert them to 8 or 16 bits")
    if image.mode == "L" and signed:
        samples = np.asarray(image).view(np.int8).astype(np.int16)
    elif image.mode in DEEP_MODES:
        samples = np.asarray(image)
    else:
        return None
    largest = full_scale(image)
    if samples.min(initial=0) < 0:
        raise ValueError("its samples are signed and some negative, so that their range is unknown")
    shift = largest.bit_length() - 8
    # Signed bytes have 7 bits: their highest is repeated as the lowest, so that full scale is 255.
    scaled = samples >> shift if shift >= 0 else samples << 1 | samples >> 6
    luma: NDArray[np.uint8] = scaled.clip(0, 255).astype(np.uint8)
    if image.mode in DEEP_MODES and _white_is_zero(image):  # Pillow inverts samples of 8 bits itself
        luma = ~luma
    key = image.info.get("transparency")
    if isinstance(key, int):
        luma[samples == key] = BACKGROUND
    return luma


def _used_bands(image: Image.Image) -> int:
    """How many bands of a TIFF are used, 1 or 3, where it has others that are no alpha channel; 0: all are used."""
    if not isinstance(image, TiffImageFile):
        return 0
    samples, color = _tag(image, SAMPLESPERPIXEL, 1), 3 if _tag(image, PHOTOMETRIC_INTERPRETATION, 1) == _RGB else 1
    extra = image.tag_v2.get(EXTRASAMPLES, ())
    if samples > color and (color == 3 or samples == 2) and (not extra or _UNSPECIFIED in extra):
        return color
    return 0


def _is_signed(image: Image.Image) -> bool:
    return isinstance(image, TiffImageFile) and _tag(image, SAMPLEFORMAT, 1) == _SIGNED


def _white_is_zero(image: Image.Image) -> bool:
    return isinstance(image, TiffImageFile) and _tag(image, PHOTOMETRIC_INTERPRETATION, 1) == _WHITE_IS_ZERO


def _tag(image: TiffImageFile, tag: int, default: int) -> int:
    """A tag's first value."""
    value = image.tag_v2.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)
