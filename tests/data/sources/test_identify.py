"""What a file is that is no image, in words."""

import numpy as np
import pytest
from tiff import RGB, tiff

from msf_faiss.data.sources.identify import describe


@pytest.mark.parametrize(
    ("encoded", "description"),
    [
        (b"", "an empty file"),
        (tiff(np.zeros((2, 2, 5), np.uint8)), "a TIFF of 5 bands of 8-bit unsigned integers"),
        (tiff(np.zeros((2, 2), np.float64)), "a TIFF of 1 band of 64-bit floating-point numbers"),
        (tiff(np.zeros((2, 2, 3), np.int16), photometric=RGB), "a TIFF of 3 bands of 16-bit signed integers"),
        (tiff(np.zeros((2, 2), np.uint16), order=">")[:30], "a damaged TIFF"),
        (b"II", "2 bytes in no known image format"),
        (b"II*\0", "a damaged TIFF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image; to read it, install pillow-heif"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video or a camera raw image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer; fetch the file with `git lfs pull`"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><p>404", "an HTML page, perhaps of a download that failed"),
        (b'<?xml version="1.0"?><svg/>', "an SVG drawing"),
        (b"%PDF-1.7", "a PDF document"),
        (b"\0" * 128 + b"DICM", "a DICOM image"),
        (b"\x93NUMPY\x01\0", "a NumPy array"),
        (b"plain text", "10 bytes in no known image format"),
    ],
)
def test_description(encoded: bytes, description: str) -> None:
    assert describe(encoded) == description


def test_no_prefix_of_a_tiff_raises() -> None:
    whole = tiff(np.zeros((2, 2, 5), np.uint8))
    assert all(describe(whole[:length]) for length in range(len(whole)))
