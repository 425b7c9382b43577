"""Images of one size in a tensor."""

import hashlib
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from msf_faiss.data.source import Reduce

_NAMED_BY = 1024  # pixels of an image by which it is known


class MemorySource:
    """A `Source` of the images in a tensor, whose memory worker processes share."""

    in_memory = True

    def __init__(
        self, images: Tensor, labels: ArrayLike | None = None, classes: Sequence[str] | None = None, *, title: str
    ) -> None:
        """`images`: uint8 [N, 3, H, W]. `labels`: [N], -1 if unlabelled. `title`: of the data set, in messages.

        Raises:
            ValueError: if shapes or dtypes differ, or only one of `labels` and `classes` is given.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 [N, 3, H, W], found {images.dtype} {list(images.shape)}")
        if (labels is None) != (classes is None):
            raise ValueError("labels and classes must be given together")
        self._images = images
        self._title = title
        self.labels: NDArray[np.int64] | None = None if labels is None else np.asarray(labels, np.int64)
        self.classes = None if classes is None else tuple(classes)
        if self.labels is not None and self.labels.shape != (len(images),):
            raise ValueError(f"labels must be [{len(images)}], one per image, found {list(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"{self._title}[{index}]"

    def identity(self) -> str:
        total = hashlib.sha256(repr(tuple(self._images.shape)).encode())
        total.update(self._images.contiguous().numpy().data)
        return total.hexdigest()

    def relative_names(self) -> Iterator[str]:
        begins = self._images.flatten(1)[:, :_NAMED_BY].contiguous().numpy()
        return (f"{self._title} {zlib.crc32(begin):08x}" for begin in begins)

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        return self._images[index]
