"""Uncompressed TIFF files of any depth, as other programs write them; Pillow writes few kinds."""

import struct

import numpy as np
from numpy.typing import NDArray

UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # SampleFormat
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # PhotometricInterpretation
_SHORT, _LONG = 3, 4


def tiff(
    pixels: NDArray[np.generic],
    *,
    bits: int | None = None,
    photometric: int = BLACK_IS_ZERO,
    extra: list[int] | None = None,
    order: str = "<",
    more: dict[int, int] | None = None,
) -> bytes:
    """A file of `pixels` [H, W] or [H, W, bands]; `bits` other than the dtype's are packed (gray only).

    `extra`: values of ExtraSamples. `order`: "<" or ">", of bytes. `more`: further tags of one value.
    """
    height, width, bands = *pixels.shape[:2], 1 if pixels.ndim == 2 else pixels.shape[2]
    kind = {"u": UNSIGNED, "i": SIGNED, "f": FLOAT}[pixels.dtype.kind]
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes() if bits is None else _packed(pixels, bits)
    bits = bits or 8 * pixels.dtype.itemsize
    tags: dict[int, tuple[int, list[int]]] = {
        256: (_LONG, [width]),
        257: (_LONG, [height]),
        258: (_SHORT, [bits] * bands),
        259: (_SHORT, [1]),
        262: (_SHORT, [photometric]),
        273: (_LONG, [0]),
        277: (_SHORT, [bands]),
        278: (_LONG, [height]),
        279: (_LONG, [len(data)]),
        339: (_SHORT, [kind] * bands),
        **{tag: (_SHORT, [value]) for tag, value in (more or {}).items()},
        **({} if extra is None else {338: (_SHORT, extra)}),
    }
    values = {tag: struct.pack(f"{order}{len(v)}{'HI'[t - _SHORT]}", *v) for tag, (t, v) in tags.items()}
    position = 8 + 2 + 12 * len(tags) + 4
    long = b""
    offsets = {}
    for tag in sorted(values):
        if len(values[tag]) > 4:
            offsets[tag] = position + len(long)
            long += values[tag]
    values[273] = struct.pack(f"{order}I", position + len(long))
    file = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for tag in sorted(tags):
        value = struct.pack(f"{order}I", offsets[tag]) if tag in offsets else values[tag].ljust(4, b"\0")
        file += struct.pack(f"{order}HHI", tag, tags[tag][0], len(tags[tag][1])) + value
    return file + struct.pack(f"{order}I", 0) + long + data


def _packed(pixels: NDArray[np.generic], bits: int) -> bytes:
    rows = ["".join(f"{int(value):0{bits}b}" for value in row) for row in pixels]
    return b"".join(int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)
