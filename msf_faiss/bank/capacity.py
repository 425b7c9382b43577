"""The number of entries of a bank, and the memory that they need."""

import os
import re

import torch

from msf_faiss.bank.flat import FlatBank
from msf_faiss.bank.ivf.bank import IvfBank
from msf_faiss.bank.ring import RingBank
from msf_faiss.bank.scan import SCAN_BANKS
from msf_faiss.config import BankConfig, IvfBankConfig, ScanBankConfig
from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.errors import UserError

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_ID_BYTES = 8


def bytes_per_entry(config: BankConfig, dim: int) -> float:
    """Return the memory of one entry of `dim` dimensions, in the ring and in its index."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    match config:
        case ScanBankConfig():
            kind: type[RingBank] = SCAN_BANKS[config.scan]
        case IvfBankConfig():
            kind = IvfBank
        case _:
            kind = FlatBank
    return dim * dtype.itemsize + _ID_BYTES + kind.extra_bytes(dim, dtype)


def resolve_capacity(
    config: BankConfig,
    *,
    dim: int,
    device: torch.device,
    images: int | None = None,
    ranks: Ranks = ALONE,
) -> int:
    """Return the capacity of the bank in entries, of all ranks together.

    Args:
        config: its capacity is a number of entries, an amount of memory, or "dataset".
        dim: dimension of an entry.
        device: of the bank.
        images: size of the data set, for "dataset".
        ranks: that share the bank, whose amount of memory is that of each rank.

    Raises:
        UserError: if the capacity is below k, or exceeds the memory of `device`.
    """
    parts = ranks.size if config.placement == "sharded" else 1
    entry_bytes = bytes_per_entry(config, dim)
    if isinstance(config.capacity, int):
        capacity = config.capacity
    elif config.capacity == "dataset":
        if images is None:
            raise UserError('bank.capacity: "dataset" needs a data set; set a number of entries instead')
        capacity = images
    else:
        number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]+)", config.capacity).groups()  # type: ignore[union-attr]
        capacity = int(float(number) * _UNITS[unit] / entry_bytes) * parts
    if capacity < config.k:
        raise UserError(
            f"bank.capacity: {config.capacity} is {capacity:,} entries of {entry_bytes:,.0f} bytes, fewer than bank.k "
            f"({config.k})"
        )
    available = total_memory(device)
    own = -(-capacity // parts)
    if available is not None and device.type != "cuda":
        available //= ranks.local_size  # the ranks of a host share its memory
    if available is not None and own * entry_bytes > available:
        remedy = "lower it, or choose bank.dtype bfloat16"
        if ranks.size > 1 and parts == 1:
            remedy += " or bank.placement sharded"
        raise UserError(
            f"bank.capacity: {own:,} entries of {entry_bytes:,.0f} bytes need {own * entry_bytes / 2**30:,.1f} GiB, "
            f"but {device} has {available / 2**30:,.1f} GiB{' per rank' if ranks.size > 1 else ''}; {remedy}"
        )
    return capacity


def total_memory(device: torch.device) -> int | None:
    """Return the memory of `device` in bytes, used or not; None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
