"""Images that are held in memory, all of one size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from msf_faiss.data.source import Reduce


class MemorySource:
    """A `Source` over a tensor. Worker processes share its memory rather than copy it."""

    in_memory = True

    def __init__(
        self, images: Tensor, labels: ArrayLike | None = None, classes: Sequence[str] | None = None, *, title: str
    ) -> None:
        """`images` uint8 [N, 3, H, W]; `labels` [N], -1 where there is none; `title` is what people call the set.

        Raises:
            ValueError: if shapes or dtypes are others, or only one of `labels` and `classes` is given.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8 [N, 3, H, W], found {images.dtype} {list(images.shape)}")
        if (labels is None) != (classes is None):
            raise ValueError("labels and classes belong together")
        self._images = images
        self._title = title
        self.labels: NDArray[np.int64] | None = None if labels is None else np.asarray(labels, np.int64)
        self.classes = None if classes is None else tuple(classes)
        if self.labels is not None and self.labels.shape != (len(images),):
            raise ValueError(f"{len(images)} images need as many labels, found {list(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"{self._title}[{index}]"

    def identity(self) -> str:
        found = hashlib.sha256(repr(tuple(self._images.shape)).encode())
        found.update(self._images.contiguous().numpy().data)
        return found.hexdigest()

    def decode(self, ids: Sequence[int], reduce: Reduce | None = None) -> list[Tensor]:
        return [self._images[index] for index in ids]
