"""The scanning bank of a given name, and what an entry of it weighs.

Shapes: B queries, C candidates, K neighbours, N slots, D dimensions.
"""

from __future__ import annotations

import torch

from msf_faiss.bank.scan.base import ScanBank, padded
from msf_faiss.bank.scan.bf16 import Bf16ScanBank
from msf_faiss.bank.scan.int8 import Int8ScanBank
from msf_faiss.bank.scan.pq import PART, PqScanBank


def create_scan_bank(
    scan: str, capacity: int, dim: int, dtype: torch.dtype, device: torch.device | str, *, max_age: int | None = None
) -> ScanBank:
    """The empty bank that scans the copy called `scan`: "bf16", "int8" or "pq".

    Raises:
        ValueError: if dtype is none of float32, float16 and bfloat16, or there is no such copy on `device`.
    """
    kinds: dict[str, type[ScanBank]] = {"bf16": Bf16ScanBank, "int8": Int8ScanBank, "pq": PqScanBank}
    return kinds[scan](capacity, dim, dtype, device, max_age=max_age)


def extra_bytes(scan: str, dim: int, dtype: torch.dtype) -> float:
    """Bytes that an entry takes beside its place in the ring."""
    match scan:
        case "bf16":
            return 0 if dtype == torch.bfloat16 else 2 * dim + 4
        case "int8":
            return padded(dim, 8)
        case _:
            return padded(dim, 2 * PART) / (2 * PART)
