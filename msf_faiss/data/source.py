"""The interface of a data set of images, whatever it reads from. Sources know neither batches nor workers.

Shapes: N images; H, W height and width of a decoded image in pixels.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.errors import UserError

Reduce = Callable[[int, int], int]
"""From the height and width of an image to the factor (1, 2, 4 or 8) by which the decoder may reduce both."""


class UnreadableImageError(UserError):
    """An image cannot be decoded. The message names its file (and row), and says why."""


@runtime_checkable
class Source(Protocol):
    """Images with random access by id, 0 <= id < len(source). Picklable, so that each worker has a copy."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """[N] class of each image, -1 if it has none; None if the data set is unlabelled."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes; None if the data set is unlabelled."""

    @property
    def in_memory(self) -> bool:
        """Whether decoded images are in memory, so that decoding costs nothing."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where an image comes from, in messages: its path, or its file and row."""

    def identity(self) -> str:
        """Short text that changes whenever images or their order may have changed; a key for results computed of them.

        Of files, path, size and time of modification count.
        """

    def relative_names(self) -> Iterable[str]:
        """What tells each image from the others, in order, the same wherever the data lie: its path below them, say."""

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        """Decode an image to uint8 RGB [3, H, W].

        `reduce` is called if the decoder can reduce the image; both sides are then divided, rounding up.

        Raises:
            UnreadableImageError: if it cannot be decoded.
        """
