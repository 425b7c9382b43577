"""Banks: FIFO memories of target embeddings that can be searched."""

import torch

from msf_faiss.bank.base import Bank, Neighbors
from msf_faiss.bank.flat import FlatBank, knn
from msf_faiss.bank.reference import ReferenceBank
from msf_faiss.config import BankConfig

__all__ = ["Bank", "FlatBank", "Neighbors", "ReferenceBank", "create_bank", "knn"]


def create_bank(config: BankConfig, *, dim: int, device: torch.device) -> Bank:
    """The empty bank that `config` asks for, for embeddings of `dim` dimensions."""
    kinds: dict[str, type[FlatBank] | type[ReferenceBank]] = {"flat": FlatBank, "reference": ReferenceBank}
    return kinds[config.kind](config.capacity, dim, getattr(torch, config.dtype), device)
