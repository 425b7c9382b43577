"""What a source of images promises, whatever it reads from.

Shapes: H, W height and width of a decoded image in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.errors import UserError

Reduce = Callable[[int, int, int], int]
"""From an image's id, height and width to how many times smaller it may be decoded: 1, 2, 4 or 8."""
ReduceOne = Callable[[int, int], int]
"""The same for one image."""


class UnreadableImageError(UserError):
    """An image that cannot be decoded; the text names its file (and its row) and the decoder's complaint."""


@runtime_checkable
class Source(Protocol):
    """A data set with random access by id, 0 <= id < len(source). Picklable, so that workers can own a copy."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """[N] class index of each image, -1 where it has none; None for an unlabelled data set."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, by index; None for an unlabelled data set."""

    @property
    def in_memory(self) -> bool:
        """True if the decoded images are held in memory, so that worker processes do not pay."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the image comes from, for people: a path, or a file and its row."""

    def identity(self) -> str:
        """Short text that is another where images or their order may be others: a name for what was computed of them.

        Files count by their path, size and time of modification.
        """

    def decode(self, ids: Sequence[int], reduce: Reduce | None = None) -> list[Tensor]:
        """Images as uint8 RGB [3, H, W] tensors, in the order of `ids`.

        `reduce` is asked about each image that can come n times smaller; its sides are then 1/n, rounded upwards.

        Raises:
            UnreadableImageError: at the first image that cannot be decoded.
        """
