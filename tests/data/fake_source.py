"""A source of made-up images and a config for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msf_faiss.config import Config
from msf_faiss.data.source import Reduce
from msf_faiss.data.sources.decode import unreadable


class FakeSource:
    """Images of many sizes, some of them unreadable."""

    in_memory = False
    classes = ("even", "odd")

    def __init__(self, count: int, bad: Sequence[int] = ()) -> None:
        self._count, self._bad = count, frozenset(bad)
        self.labels = np.arange(count) % 2

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"fake {index}"

    def identity(self) -> str:
        return "fake"

    def relative_names(self) -> Iterator[str]:
        return map(str, range(self._count))

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        if index in self._bad:
            raise unreadable(self.name(index), "it is bad")
        height, width = 20 + index % 7, 20 + index % 5
        return (torch.arange(3 * height * width) * (index + 1)).to(torch.uint8).view(3, height, width)


def config(batch_size: int = 8, *, size: int = 16, online: str = "strong", **data: Any) -> Config:
    """`data`: keys of the section `data`."""
    return Config.model_validate(
        {
            "seed": 5,
            "data": {"kind": "folder", "path": "unused", "workers": 0} | data,
            "views": {"size": size, "online": online},
            "train": {"batch_size": batch_size},
        }
    )
