"""What a file is that cannot be read as an image, in words for its owner."""

import io
import warnings

from PIL.TiffImagePlugin import BITSPERSAMPLE, COMPRESSION, SAMPLEFORMAT, SAMPLESPERPIXEL, ImageFileDirectory_v2

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file with `git lfs pull`"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\xff\x0a", "a JPEG XL image, which Pillow does not read"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image, which Pillow does not read"),
    (b"FUJIFILMCCD-RAW", "a camera raw image"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
)
_NUMBERS = {1: "unsigned integers", 2: "signed integers", 3: "floating-point numbers"}  # by TIFF's SampleFormat


def describe(encoded: bytes) -> str:
    """A noun phrase such as "a TIFF of 5 bands of 8-bit unsigned integers", from a file's contents."""
    if not encoded:
        return "an empty file"
    if encoded[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _describe_tiff(encoded)
    if is_heif(encoded):
        return "a HEIC image; to read it, install pillow-heif"
    if encoded[4:8] == b"ftyp":
        return "a video or a camera raw image"
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"AVI ":
        return "an AVI video"
    if encoded[128:132] == b"DICM":
        return "a DICOM image"
    for signature, name in _SIGNATURES:
        if encoded.startswith(signature):
            return name
    start = encoded[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, perhaps of a download that failed"
    if start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in encoded[:4096].lower()):
        return "an SVG drawing"
    return f"{len(encoded):,} bytes in no known image format"


def is_heif(encoded: bytes) -> bool:
    """Whether a file is HEIC or another HEIF image than AVIF."""
    return encoded[4:8] == b"ftyp" and encoded[8:12] in _HEIF_BRANDS


def _describe_tiff(encoded: bytes) -> str:
    big = 43 in encoded[2:4]  # BigTIFF, whose header is longer
    try:
        directory = ImageFileDirectory_v2(encoded[: 16 if big else 8])
        file = io.BytesIO(encoded)
        file.seek(directory.next)
        with warnings.catch_warnings(action="ignore"):  # of a truncated directory
            directory.load(file)
        bits, kind = directory[BITSPERSAMPLE][0], directory.get(SAMPLEFORMAT, (1,))[0]
        bands, compression = directory.get(SAMPLESPERPIXEL, 1), directory.get(COMPRESSION, 1)
    except Exception:  # the directory is damaged, in any of the ways that bytes can be
        return "a damaged TIFF"
    numbers = _NUMBERS.get(kind, "numbers")
    kind_of_tiff = f"a TIFF of {bands} band{'' if bands == 1 else 's'} of {bits}-bit {numbers}"
    return kind_of_tiff if compression == 1 else f"{kind_of_tiff} (compression {compression})"
