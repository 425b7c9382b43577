"""The result of a search.

Shapes: B queries, K neighbours.
"""

from typing import NamedTuple

from torch import Tensor


class Neighbors(NamedTuple):
    """The entries most similar to each query, best first, in canonical order (see `rescore`)."""

    similarities: Tensor  # [B, K] float32 cosine
    slots: Tensor  # [B, K] int64, slots of a bank, valid until its next push; or row numbers
