"""Decode a batch of images and handle unreadable ones as `data.unreadable` says: raise, or leave out and count."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.config import SourceConfig
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.errors import UserError

_SHOWN = 5  # unreadable images that an error lists


class _Decoded(NamedTuple):
    """The readable images of a batch, and the problems of the others."""

    ids: NDArray[np.int64]  # [B]
    images: list[Tensor]  # B of uint8 [3, H, W]
    unreadable: dict[int, str]  # problem by id


def decode_readable(
    source: Source, ids: NDArray[np.int64], config: SourceConfig, reduce: Callable[[int, int, int], int] | None = None
) -> _Decoded:
    """Decode the images `ids`. `reduce`: a `source.Reduce` with the image's id as an additional first argument.

    Raises:
        UnreadableImageError: with `unreadable: error`, for the first unreadable image.
    """
    readable, images, unreadable = [], [], {}
    for index in ids.tolist():
        try:
            images.append(source.decode(index, reduce and partial(reduce, index)))
        except UnreadableImageError as error:
            if config.unreadable == "error":
                raise UnreadableImageError(f"{error}; repair or remove it, or set data.unreadable=skip") from error
            unreadable[index] = str(error)
        else:
            readable.append(index)
    return _Decoded(np.array(readable, np.int64), images, unreadable)


def add_unreadable(known: dict[int, str], new: dict[int, str], config: SourceConfig) -> None:
    """Add the problems `new` to those `known`, both by id.

    Raises:
        UserError: if there are more than `data.unreadable_limit`.
    """
    known |= new
    if len(known) > config.unreadable_limit:
        raise UserError(
            f"{len(known)} images are unreadable, more than data.unreadable_limit ({config.unreadable_limit}); repair"
            f" or remove them, or raise the limit:{list_problems(known)}"
        )


def list_problems(unreadable: dict[int, str]) -> str:
    """The first few problems, each on its own indented line."""
    lines = list(unreadable.values())
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "".join(f"\n  {line}" for line in lines[:_SHOWN] + more)
