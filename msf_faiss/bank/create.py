"""Creates the bank that a config describes."""

from functools import partial

import torch

from msf_faiss.bank.base import Bank
from msf_faiss.bank.capacity import resolve_capacity
from msf_faiss.bank.flat import FlatBank
from msf_faiss.bank.ivf.bank import IvfBank
from msf_faiss.bank.parallel import ReplicatedBank, ShardedBank
from msf_faiss.bank.reference import ReferenceBank
from msf_faiss.bank.ring import RingBank, RingSpec
from msf_faiss.bank.scan import SCAN_BANKS
from msf_faiss.config import BankConfig, FlatBankConfig, IvfBankConfig, ReferenceBankConfig, ScanBankConfig
from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.search.autotune import engines


def create_bank(
    config: BankConfig,
    *,
    dim: int,
    device: torch.device | str = "cpu",
    images: int | None = None,
    batch: int | None = None,
    ranks: Ranks = ALONE,
) -> Bank:
    """Create an empty bank.

    Args:
        config: kind, size and options.
        dim: dimension of an embedding.
        device: of the entries and of all queries.
        images: size of the data set, for a capacity of "dataset".
        batch: queries in a search, of all ranks, with which `engine: auto` times the engines; None: it uses FAISS.
        ranks: that push and search together.

    Raises:
        UserError: if the bank does not fit into memory.
        ValueError: if its kind or engine does not support `device`, or it cannot be sharded.
    """
    device = torch.device(device)
    capacity = resolve_capacity(config, dim=dim, device=device, images=images, ranks=ranks)
    spec = RingSpec(capacity, dim, getattr(torch, config.dtype), device, config.max_age)
    if ranks.size > 1 and config.placement == "sharded":
        return ShardedBank(partial(_create_local, config, batch=batch), spec, ranks)
    own = None if batch is None else -(-batch // ranks.size)
    local = _create_local(config, spec, batch=own)
    return local if ranks.size == 1 else ReplicatedBank(local, ranks)


def _create_local(config: BankConfig, spec: RingSpec, *, batch: int | None) -> RingBank:
    """Create a bank of this process, which is searched for `batch` queries at a time."""
    match config:
        case ReferenceBankConfig():
            return ReferenceBank(spec)
        case ScanBankConfig():
            return SCAN_BANKS[config.scan](spec)
        case IvfBankConfig(ivf=ivf):
            return IvfBank(
                spec,
                lists=None if ivf.lists == "auto" else ivf.lists,
                probes=None if ivf.probes == "auto" else ivf.probes,
                segments=ivf.segments,
                min_recall=config.min_recall,
            )
        case FlatBankConfig(engine="auto"):
            bank = FlatBank(spec)
            if batch is not None:
                bank.use_fastest_engine(batch=batch, k=config.k)
            return bank
        case FlatBankConfig():
            available = engines(torch.device(spec.device))
            if config.engine not in available:
                raise ValueError(f"no engine {config.engine} on {spec.device}; choose one of {', '.join(available)}")
            return FlatBank(spec, engine=available[config.engine])
