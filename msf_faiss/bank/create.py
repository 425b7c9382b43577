"""From the config of a bank to the bank."""

import torch

from msf_faiss.bank.base import Bank
from msf_faiss.bank.capacity import resolve_capacity
from msf_faiss.bank.flat import FlatBank
from msf_faiss.bank.ivf.bank import IvfBank
from msf_faiss.bank.parallel import ReplicatedBank, ShardedBank, shard_capacity
from msf_faiss.bank.reference import ReferenceBank
from msf_faiss.bank.ring import RingBank
from msf_faiss.bank.scan.create import create_scan_bank
from msf_faiss.config import BankConfig, FlatBankConfig, IvfBankConfig, ReferenceBankConfig, ScanBankConfig
from msf_faiss.distributed.ranks import Ranks


def create_bank(
    config: BankConfig,
    *,
    dim: int,
    device: torch.device,
    images: int | None = None,
    batch: int | None = None,
    ranks: Ranks | None = None,
) -> Bank:
    """The empty bank that `config` asks for.

    Args:
        config: kind, size and the rest.
        dim: dimensions of an embedding.
        device: where the bank is, and its queries will be.
        images: size of the data set, for a capacity of "dataset".
        batch: queries of a step, of all ranks, on which `engine: auto` times the engines; None: it takes FAISS.
        ranks: that fill and search it together; None: this process alone.

    Raises:
        UserError: if the bank does not fit into memory.
        ValueError: if its kind or engine does not exist on `device`, or it cannot be sharded.
    """
    ranks = ranks or Ranks.alone()
    capacity = resolve_capacity(config, dim=dim, device=device, images=images, ranks=ranks)
    if ranks.size == 1:
        return _local_bank(config, capacity, dim, device, config.max_age, batch)
    if config.placement == "replicated":
        own = None if batch is None else -(-batch // ranks.size)
        return ReplicatedBank(_local_bank(config, capacity, dim, device, config.max_age, own), ranks)
    shard = _local_bank(config, shard_capacity(capacity, ranks), dim, device, None, batch)
    return ShardedBank(shard, capacity, ranks, max_age=config.max_age)


def _local_bank(
    config: BankConfig, capacity: int, dim: int, device: torch.device, max_age: int | None, batch: int | None
) -> RingBank:
    """A bank of this process; `batch` queries are searched at a time."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    match config:
        case FlatBankConfig():
            engine = None if config.engine == "auto" else config.engine
            bank = FlatBank(capacity, dim, dtype, device, max_age=max_age, engine=engine)
            if config.engine == "auto" and batch is not None:
                bank.use_fastest_engine(batch=batch, k=config.k)
            return bank
        case ReferenceBankConfig():
            return ReferenceBank(capacity, dim, dtype, device, max_age=max_age)
        case ScanBankConfig():
            return create_scan_bank(config.scan, capacity, dim, dtype, device, max_age=max_age)
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
                max_age=max_age,
            )
