"""Every bank that the contract and property tests hold to the oracle, and how small ones come to use their indexes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from msf_faiss.bank import Bank, FlatBank, Neighbors, ReferenceBank, engines, ivf, scan
from msf_faiss.bank.faiss_setup import has_gpu
from msf_faiss.bank.ivf import IvfBank
from msf_faiss.bank.scan import ApproximateScanBank, Bf16ScanBank, Int8ScanBank, PqScanBank


@dataclass(frozen=True)
class BankKind:
    """A way of making a bank: kind(capacity, dim, dtype, device, max_age=…), with the defaults of `RingBank`."""

    name: str
    create: Callable[..., Bank]
    exact: bool = True  # finds what the oracle finds; otherwise perhaps others, but valid ones
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


BANKS = [
    BankKind("reference", ReferenceBank),
    BankKind("flat-faiss", partial(FlatBank, engine="faiss")),
    BankKind("flat-torch", partial(FlatBank, engine="torch")),
    BankKind("flat-streams", partial(FlatBank, engine="streams"), devices=("cuda",) if has_gpu() else ()),
    BankKind("flat-fastest", _fastest),
    BankKind("scan-bf16", Bf16ScanBank),
    BankKind("scan-int8", Int8ScanBank, exact=False),
    BankKind("scan-pq", PqScanBank, exact=False, devices=("cpu",)),
    BankKind("ivf", partial(_ivf, segments=1), exact=False, devices=("cpu",)),
    BankKind("ivf-segments", partial(_ivf, segments=3), exact=False, devices=("cpu",)),
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
        How many queries of each search an index answered.
    """
    answered: list[int] = []

    def proposing(kind: type[ApproximateScanBank]) -> Callable[..., Tensor]:
        propose = kind._propose

        def counted(self: ApproximateScanBank, queries: Tensor, k: int, newest: int) -> Tensor:
            answered.append(len(queries))
            return propose(self, queries, k, newest)

        return counted

    search = IvfBank._search

    def counted(self: IvfBank, queries: Tensor, k: int) -> Neighbors:
        exactly = int(self._answered[0])
        found = search(self, queries, k)
        answered.append(len(queries) - (int(self._answered[0]) - exactly))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_NEWEST", 4)
        patch.setattr(scan, "_PQ_TRAINING", 16)  # as many as a code of 4 bits tells apart: FAISS takes no fewer
        patch.setattr(ivf, "_FIRST", 16)
        patch.setattr(engines, "_TILE", 16)  # and of FAISS's rows several tiles, each on a stream of its own on CUDA
        patch.setattr(Int8ScanBank, "_propose", proposing(Int8ScanBank))
        patch.setattr(PqScanBank, "_propose", proposing(PqScanBank))
        patch.setattr(IvfBank, "_search", counted)
        yield answered
