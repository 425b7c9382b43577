"""What a search returns.

Shapes: B queries, K neighbours.
"""

from typing import NamedTuple

from torch import Tensor


class Neighbors(NamedTuple):
    """The entries most similar to each query, best first, in canonical order (see `Bank.search`)."""

    similarities: Tensor  # [B, K] float32 cosine
    slots: Tensor  # [B, K] int64, a place in the bank; meaningful until the next push
