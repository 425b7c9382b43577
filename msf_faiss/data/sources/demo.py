"""The built-in images: any number of gray textures of ten kinds, generated from a seed.

Images of a kind differ in what the training views vary (position, scale, contrast, light, reflection) and in a small
rotation, which they do not vary. So raw pixels and untrained networks classify them poorly, and trained ones well.

Shapes: n images, S pixels of a side. Lengths are in pixels unless stated in periods of the pattern.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from msf_faiss.counter_rng import hash_counters, uniform

Array = NDArray[np.float64]

_CHUNK = 1_000  # images rendered at a time
_TURN = 2 * np.pi
_TILT = 0.1 * np.pi  # largest rotation in either direction
_PERIODS = (5 / 32, 9 / 32)  # of the image's side
_CONTRAST = (0.25, 0.9)
_LIGHT = 0.5  # largest difference in brightness across the image
_NOISE = 0.05  # half width
_DRAWS = 32  # random numbers per image
_SHAPE, _NOISE_STREAM = 1, 2  # streams of random numbers


class _Canvas:
    """Pixel coordinates of n images, and random numbers for their patterns."""

    def __init__(self, numbers: Array, size: int) -> None:
        self.numbers = numbers[:, :, None, None]  # [draws, n, 1, 1]
        axis = np.arange(size) - (size - 1) / 2
        self.x, self.y = axis[None, None, :], axis[None, :, None]
        self.size = size
        tilt = (2 * self.numbers[0] - 1) * _TILT
        low, high = _PERIODS
        self.period = size * low * (high / low) ** self.numbers[1]  # [n, 1, 1]
        along, across = np.cos(tilt), np.sin(tilt)
        self.u = (along * self.x + across * self.y) / self.period + self.numbers[2]  # [n, S, S] periods
        self.v = (along * self.y - across * self.x) / self.period + self.numbers[3]
        self.pixel = 2 / self.period  # width of a pixel in units of `_wave`, which rises by 2 in half a period

    def polar(self) -> tuple[Array, Array]:
        """Distance from a random point near the middle, and angle around it, [n, S, S] each."""
        x = self.x - (self.numbers[4] - 0.5) * self.size / 2
        y = self.y - (self.numbers[5] - 0.5) * self.size / 2
        return np.hypot(x, y), np.arctan2(y, x)

    def edge(self, level: Array, width: float) -> Array:
        """1 where `level` is positive, else 0, with a soft edge `width` pixels wide."""
        return _ramp(level / (width * self.pixel))


def _ramp(level: Array) -> Array:
    return np.clip(level / 2 + 0.5, 0, 1)


def _wave(phase: Array) -> Array:
    """Triangle wave from -1 to 1 with period 1."""
    return 4 * np.abs(phase % 1 - 0.5) - 1


def _stripes(c: _Canvas) -> Array:
    return c.edge(_wave(c.u), 2)


def _checks(c: _Canvas) -> Array:
    return c.edge(_wave(c.u) * _wave(c.v), 1.2)


def _dots(c: _Canvas) -> Array:
    return c.edge(0.32 - np.hypot(c.u % 1 - 0.5, c.v % 1 - 0.5), 0.5)


def _rings(c: _Canvas) -> Array:
    distance, _ = c.polar()
    return c.edge(_wave(distance / c.period + c.numbers[2]), 2)


def _rays(c: _Canvas) -> Array:
    distance, angle = c.polar()
    spokes = 4 + np.floor(4 * c.numbers[6])
    return _ramp(np.sin(angle * spokes + _TURN * c.numbers[2]) * np.minimum(distance * 4 / c.size, 1) / 0.35)


def _waves(c: _Canvas) -> Array:
    return c.edge(_wave(c.u + 0.35 * np.sin(np.pi * c.v)), 2)


def _blobs(c: _Canvas) -> Array:
    turns, speeds, phases = c.numbers[8:26].reshape(6, 3, *c.numbers.shape[1:]).swapaxes(0, 1)  # [6, n, 1, 1] each
    steps = (np.cos(_TURN * turns) * c.u + np.sin(_TURN * turns) * c.v) * (0.44 + 0.4 * speeds)
    return _ramp(np.sin(_TURN * (steps + phases)).sum(0) / 0.8)


def _grid(c: _Canvas) -> Array:
    return c.edge(np.maximum(_wave(0.8 * c.u), _wave(0.8 * c.v)) - 0.55, 1.2)


def _bricks(c: _Canvas) -> Array:
    row = np.floor(c.v)
    end, side = (1 - np.abs(2 * (phase % 1) - 1) for phase in (c.u / 2 + row / 2, c.v))
    return c.edge(np.minimum(end, side / 2) - 0.14, 0.35)


def _triangles(c: _Canvas) -> Array:
    return c.edge(2 * (c.v % 1) - 1 - _wave(c.u), 1.5)


_KINDS: dict[str, Callable[[_Canvas], Array]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "rays": _rays,
    "waves": _waves,
    "blobs": _blobs,
    "grid": _grid,
    "bricks": _bricks,
    "triangles": _triangles,
}

CLASSES = tuple(_KINDS)
"""Names of the kinds, by label."""


def render(ids: NDArray[np.int64], *, seed: int, size: int = 32) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Generate the images `ids` [n]; image i is of kind i mod 10. Each depends only on (seed, id, size).

    Returns:
        images: uint8 [n, S, S, 3] with three equal channels.
        labels: int64 [n].

    Raises:
        ValueError: if an id or the seed is negative, or `size` is below 8.
    """
    ids = np.asarray(ids, np.int64)
    if size < 8 or seed < 0 or (ids < 0).any():
        raise ValueError(f"ids and seed must not be negative and size at least 8, found seed {seed} and size {size}")
    labels = ids % len(CLASSES)
    images = np.empty((len(ids), size, size, 3), np.uint8)
    for start in range(0, len(ids), _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw(ids[part], labels[part], seed, size)[..., None]
    return images, labels


def _draw(ids: NDArray[np.int64], labels: NDArray[np.int64], seed: int, size: int) -> NDArray[np.uint8]:
    numbers = uniform(seed, _SHAPE, ids, count=_DRAWS)  # [draws, n]
    ink = np.empty((len(ids), size, size))
    for label, kind in enumerate(_KINDS.values()):
        rows = np.flatnonzero(labels == label)
        if len(rows):
            ink[rows] = kind(_Canvas(np.ascontiguousarray(numbers[:, rows]), size))
    shade, brightness, slope, direction = numbers[26:30, :, None, None]  # [n, 1, 1] each
    contrast = _CONTRAST[0] + (_CONTRAST[1] - _CONTRAST[0]) * shade
    axis = (np.arange(size) - (size - 1) / 2) / size
    light = np.cos(_TURN * direction) * axis + np.sin(_TURN * direction) * axis[:, None]  # [n, S, S]
    bits = hash_counters(seed, _NOISE_STREAM, ids[:, None], np.arange(size * size)).reshape(ink.shape)
    noise = (bits >> np.uint64(40)) * 2.0**-23 - 1
    middle = 0.5 + (brightness - 0.5) * (1 - contrast)
    level = middle + contrast * (ink - 0.5) + _LIGHT * (slope - 0.5) * light + _NOISE * noise
    drawn: NDArray[np.uint8] = np.rint(np.clip(level, 0, 1) * 255).astype(np.uint8)
    return drawn
