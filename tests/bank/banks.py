"""Every bank that the contract and property tests hold to the oracle, and how small ones come to use their indexes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from msf_faiss.bank import (
    Bank,
    FlatBank,
    Neighbors,
    ReferenceBank,
    ReplicatedBank,
    ShardedBank,
    engines,
    ivf,
    scan,
    tiled,
)
from msf_faiss.bank.ivf.bank import IvfBank
from msf_faiss.bank.scan.bf16 import Bf16ScanBank
from msf_faiss.bank.scan.int8 import Int8ScanBank
from msf_faiss.bank.scan.pq import PqScanBank, _PqCodes
from msf_faiss.distributed.ranks import Ranks
from msf_faiss.search.faiss_setup import has_gpu
from msf_faiss.search.torch_engine import Shortlist


@dataclass(frozen=True)
class BankKind:
    """A way of making a bank: kind(capacity, dim, dtype, device, max_age=…), with the defaults of `RingBank`."""

    name: str
    create: Callable[..., Bank]
    exact: bool = True  # finds what the oracle finds; otherwise perhaps others, but valid ones
    indexed: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __call__(self, *arguments: object, **options: object) -> Bank:
        return self.create(*arguments, **options)

    def __str__(self) -> str:
        return self.name


def _fastest(*arguments: object, **options: object) -> Bank:
    bank = FlatBank(*arguments, **options)  # type: ignore[arg-type]
    bank.use_fastest_engine(batch=8, k=3)
    return bank


def _ivf(capacity: int, *arguments: object, segments: int, **options: object) -> Bank:
    segments = max(1, min(segments, capacity))
    lists = max(1, min(4, -(-capacity // segments)))
    return IvfBank(capacity, *arguments, lists=lists, segments=segments, **options)


def _replicated(*arguments: object, **options: object) -> Bank:
    return ReplicatedBank(FlatBank(*arguments, **options), Ranks.alone())  # type: ignore[arg-type]


def _sharded(capacity: int, *arguments: object, max_age: int | None = None) -> Bank:
    """All of it on one rank; tests/bank/test_parallel.py has more."""
    shard = FlatBank(capacity, *arguments, max_age=max_age)  # type: ignore[arg-type]
    return ShardedBank(shard, capacity, Ranks.alone(), max_age=max_age)


BANKS = [
    BankKind("reference", ReferenceBank),
    BankKind("flat-faiss", partial(FlatBank, engine="faiss")),
    BankKind("flat-torch", partial(FlatBank, engine="torch")),
    BankKind("flat-streams", partial(FlatBank, engine="streams"), devices=("cuda",) if has_gpu() else ()),
    BankKind("flat-fastest", _fastest),
    BankKind("scan-bf16", Bf16ScanBank, indexed=True),
    BankKind("scan-int8", Int8ScanBank, exact=False, indexed=True),
    BankKind("scan-pq", PqScanBank, exact=False, indexed=True, devices=("cpu",)),
    BankKind("ivf", partial(_ivf, segments=1), exact=False, indexed=True, devices=("cpu",)),
    BankKind("replicated", _replicated),
    BankKind("sharded", _sharded),
    BankKind("ivf-segments", partial(_ivf, segments=3), exact=False, indexed=True, devices=("cpu",)),
]

ON_CPU = [kind for kind in BANKS if "cpu" in kind.devices]

PLACES = [
    pytest.param(kind, device, id=f"{kind}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for kind in BANKS
    for device in kind.devices
    if device == "cpu" or torch.cuda.is_available()
]


@contextmanager
def small_indexes() -> Iterator[list[int]]:
    """Indexes at work in banks of a few dozen entries, which would be searched exactly otherwise.

    Yields:
        How many queries of each search were answered with an index, in the banks that have one.
    """
    answered: list[int] = []
    scanned, listed, probed = scan.shortlist, _PqCodes.search, IvfBank._search

    def scanning(product: object, dtype: torch.dtype, ranges: object, count: int, queries: Tensor) -> Shortlist:
        answered.append(len(queries))
        return scanned(product, dtype, ranges, count, queries)  # type: ignore[arg-type]

    def listing(self: _PqCodes, queries: Tensor, count: int) -> Tensor:
        answered.append(len(queries))
        return listed(self, queries, count)

    def probing(self: IvfBank, queries: Tensor, k: int) -> Neighbors:
        before = int(self._answered[0])
        found = probed(self, queries, k)
        answered.append(len(queries) - (int(self._answered[0]) - before))
        return found

    with pytest.MonkeyPatch.context() as patch:
        for module in (tiled, scan):
            patch.setattr(module, "GROUP", 2)
        patch.setattr(scan, "_FEWEST", 2)
        patch.setattr(scan, "_GROUPS", 8)
        patch.setattr(scan, "_UNSCANNED", 0)
        patch.setattr(scan, "_NEWEST", 8)
        patch.setattr(scan, "_PQ_MOST", 8)  # at most as many: see `PqScanBank._search`
        patch.setattr(scan, "_PQ_TRAINING", 16)  # as many as a code of 4 bits tells apart: FAISS takes no fewer
        patch.setattr(ivf, "_FIRST", 16)
        patch.setattr(engines, "_TILE", 16)  # and of FAISS's rows several tiles, each on a stream of its own on CUDA
        patch.setattr(scan, "shortlist", scanning)
        patch.setattr(_PqCodes, "search", listing)
        patch.setattr(IvfBank, "_search", probing)
        yield answered
