"""Banks: FIFO memories of target embeddings that can be searched."""

import torch

from msf_faiss.bank.base import ApproximateBank, Bank, Neighbors
from msf_faiss.bank.flat import FlatBank, knn
from msf_faiss.bank.ivf import IvfBank
from msf_faiss.bank.reference import ReferenceBank
from msf_faiss.bank.scan import create_scan_bank
from msf_faiss.bank.sizing import capacity_of
from msf_faiss.config import BankConfig, FlatBankConfig, IvfBankConfig, ReferenceBankConfig, ScanBankConfig

__all__ = ["ApproximateBank", "Bank", "FlatBank", "IvfBank", "Neighbors", "ReferenceBank", "create_bank", "knn"]


def create_bank(
    config: BankConfig,
    *,
    dim: int,
    device: torch.device,
    images: int | None = None,
    batch: int | None = None,
    ranks: object = None,
) -> Bank:
    """The empty bank that `config` asks for.

    Args:
        config: kind, size and the rest.
        dim: dimensions of an embedding.
        device: where the bank is, and its queries will be.
        images: size of the data set, for a capacity of "dataset".
        batch: queries in a search, on which `engine: auto` times the engines; None: it takes FAISS.

    Raises:
        UserError: if the bank does not fit into memory.
        ValueError: if its kind or engine does not exist on `device`.
    """
    capacity = capacity_of(config, dim=dim, device=device, images=images)
    dtype: torch.dtype = getattr(torch, config.dtype)
    match config:
        case FlatBankConfig():
            engine = None if config.engine == "auto" else config.engine
            bank = FlatBank(capacity, dim, dtype, device, max_age=config.max_age, engine=engine)
            if config.engine == "auto" and batch is not None:
                bank.use_fastest_engine(batch=batch, k=config.k)
            return bank
        case ReferenceBankConfig():
            return ReferenceBank(capacity, dim, dtype, device, max_age=config.max_age)
        case ScanBankConfig():
            return create_scan_bank(config.scan, capacity, dim, dtype, device, max_age=config.max_age)
        case IvfBankConfig():
            return IvfBank(
                capacity,
                dim,
                dtype,
                device,
                lists=None if config.ivf.lists == "auto" else config.ivf.lists,
                probes=None if config.ivf.probes == "auto" else config.ivf.probes,
                segments=config.ivf.segments,
                min_recall=config.min_recall,
                max_age=config.max_age,
            )
