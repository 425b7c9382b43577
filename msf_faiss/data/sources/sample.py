"""Look at a sample of a data set for what its images lose on the way to 8-bit RGB, and warn of it once."""

import contextlib
import logging
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.data.sources.decode import observer
from msf_faiss.data.sources.to_rgb import DEEP_MODES, full_scale, ignored_content

_IMAGES = 32
_SECONDS = 2.0  # large PNGs take long to decode, and the sample is only for warnings
_DARK = 1 / 4  # of full scale: 16-bit files with values of 10, 12 or 14 bits stay below

_log = logging.getLogger(__name__)


def warn_of_losses(source: Source, title: str) -> None:
    """Decode some images, evenly spaced; log a warning for each kind of content that encoders will not see."""
    ignored: dict[str, tuple[int, str]] = {}  # by kind: number of images, name of the first
    brightest: list[float] = []  # of deep images, as a share of full scale

    def look(image: Image.Image, name: Callable[[], str]) -> None:
        if kind := ignored_content(image):
            count, first = ignored.get(kind, (0, name()))
            ignored[kind] = count + 1, first
        if image.mode in DEEP_MODES:
            brightest.append(float(np.asarray(image).max(initial=0)) / full_scale(image))

    deadline = time.monotonic() + _SECONDS
    token = observer.set(look)
    try:
        for index in np.unique(np.linspace(0, len(source) - 1, _IMAGES).astype(np.int64)).tolist():
            with contextlib.suppress(UnreadableImageError):
                source.decode(index, lambda height, width: 8)
            if time.monotonic() > deadline:
                break
    finally:
        observer.reset(token)
    for kind, (count, first) in ignored.items():
        _log.warning("%s: in some images %s (%d of a sample of %d; first %s)", title, kind, count, _IMAGES, first)
    if brightest and max(brightest) <= _DARK:
        _log.warning(
            "%s: the 16-bit images use only the darkest %.2g %% of their range, and will look black; rescale them",
            title,
            100 * max(brightest),
        )
