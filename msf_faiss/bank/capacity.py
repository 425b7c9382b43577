"""How many entries a bank gets, and what they weigh."""

from __future__ import annotations

import os
import re

import torch

from msf_faiss.bank.ivf import bank as ivf
from msf_faiss.bank.scan import create as scan
from msf_faiss.config import BankConfig, IvfBankConfig, ScanBankConfig
from msf_faiss.distributed.ranks import Ranks
from msf_faiss.errors import UserError

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_ID = 8  # bytes


def bytes_per_entry(config: BankConfig, dim: int) -> float:
    """Memory of one entry of `dim` dimensions: in the ring, and in what finds it."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    ring = dim * dtype.itemsize + _ID
    match config:
        case ScanBankConfig():
            return ring + scan.extra_bytes(config.scan, dim, dtype)
        case IvfBankConfig():
            return ring + ivf.extra_bytes(dim)
        case _:
            return ring


def resolve_capacity(
    config: BankConfig,
    *,
    dim: int,
    device: torch.device,
    images: int | None = None,
    ranks: Ranks | None = None,
) -> int:
    """The capacity in entries that `config` asks for, of all ranks together.

    Args:
        config: its capacity is a count, an amount of memory, or "dataset".
        dim: dimensions of an entry.
        device: where the bank will be.
        images: size of the data set, for "dataset".
        ranks: that hold the bank; an amount of memory is that of each. None: this process alone.

    Raises:
        UserError: if it is fewer than k entries, or more than the memory of `device` holds.
    """
    ranks = ranks or Ranks.alone()
    parts = ranks.size if config.placement == "sharded" else 1
    weight = bytes_per_entry(config, dim)
    if isinstance(config.capacity, int):
        capacity = config.capacity
    elif config.capacity == "dataset":
        if images is None:
            raise UserError('bank.capacity: "dataset" needs a data set; give a number of entries')
        capacity = images
    else:
        number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]+)", config.capacity).groups()  # type: ignore[union-attr]
        capacity = int(float(number) * _UNITS[unit] / weight) * parts
    if capacity < config.k:
        raise UserError(
            f"bank.capacity: {config.capacity} is {capacity:,} entries of {weight:,.0f} bytes, fewer than bank.k "
            f"({config.k})"
        )
    present = memory_of(device)
    own = -(-capacity // parts)
    if present is not None and device.type != "cuda":
        present //= ranks.local_size  # which all ranks of a host share
    if present is not None and own * weight > present:
        remedy = "lower it, or choose bank.dtype bfloat16"
        if ranks.size > 1 and parts == 1:
            remedy += " or bank.placement sharded"
        raise UserError(
            f"bank.capacity: {own:,} entries of {weight:,.0f} bytes take {own * weight / 2**30:,.1f} GiB, "
            f"and {device} has {present / 2**30:,.1f}{' for each rank' if ranks.size > 1 else ''}; {remedy}"
        )
    return capacity


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that `device` has in all; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
