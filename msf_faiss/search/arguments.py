"""Checks of the arguments of a search, with the same words wherever they fail.

Shapes: M vectors, D dimensions.
"""

import operator
import reprlib
from typing import SupportsIndex

import torch
from torch import Tensor

NORM_TOLERANCE = 2.0**-6  # of a unit vector's norm; rounding to bfloat16, before or after, changes it by 2^-8 at most


class VectorError(ValueError):
    """Vectors that are not finite, or not of unit norm."""


def as_count(value: SupportsIndex, name: str, least: int = 1) -> int:
    """Return an integer of any type (Python's, numpy's, a tensor's) as an int.

    Raises:
        ValueError: if it is not an integer, or below `least`.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, found {reprlib.repr(value)}") from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, found {count}")
    return count


def check_tensor(value: object, name: str) -> None:
    """Raise ValueError unless `value` is a dense tensor."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        kind = type(value)
        found = value.layout if isinstance(value, Tensor) else f"{kind.__module__}.{kind.__qualname__}"
        raise ValueError(f"{name} must be a dense torch tensor, found {found}; torch.as_tensor converts arrays")


def check_vectors(vectors: Tensor, name: str, dim: int, device: torch.device) -> None:
    """Raise ValueError unless `vectors` are [M, `dim`], floating point of 16 bits or more, on `device`."""
    check_tensor(vectors, name)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise ValueError(f"{name} must be [*, {dim}], found {list(vectors.shape)}")
    if not vectors.dtype.is_floating_point or vectors.itemsize < 2:
        raise ValueError(f"{name} must be floating point, of 16 bits or more, found {vectors.dtype}")
    if vectors.device != device:
        raise ValueError(f"{name} are on {vectors.device}, the bank is on {device}")


def check_slots(slots: Tensor, device: torch.device) -> None:
    """Raise ValueError unless `slots` is an int64 tensor on `device`."""
    check_tensor(slots, "slots")
    if slots.dtype != torch.int64 or slots.device != device:
        raise ValueError(f"slots must be int64 on {device}, found {slots.dtype} on {slots.device}")


def are_unit(vectors: Tensor) -> Tensor:
    """Return which of `vectors` [M, D] are finite and of unit norm, or zero: [M] bool. Does not wait for the device."""
    norms: Tensor = torch.linalg.vector_norm(
        vectors.detach(), dim=1, dtype=torch.float32 if vectors.itemsize < 4 else None
    )
    return ((norms - 1).abs() <= NORM_TOLERANCE) | (norms == 0)


def check_unit(vectors: Tensor, name: str) -> None:
    """Raise VectorError unless all `vectors` [M, D] are finite and of unit norm, or zero."""
    vectors = vectors.detach()
    wrong = ~are_unit(vectors)
    if not wrong.any():
        return
    row = int(wrong.nonzero()[0])
    finite = bool(vectors[row].isfinite().all())
    defect = f"has norm {float(vectors[row].double().norm()):.4g}" if finite else "is not finite"
    raise VectorError(
        f"{name} must be finite and have unit norm, but row {row} {defect} ({int(wrong.sum()):,} such of "
        f"{len(vectors):,} rows); torch.nn.functional.normalize gives unit norm"
    )
