"""Every bank that the contract and property tests hold to the oracle."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from msf_faiss.bank import Bank, FlatBank, ReferenceBank
from msf_faiss.bank.ivf import IvfBank
from msf_faiss.bank.scan import Bf16ScanBank, Int8ScanBank, PqScanBank


@dataclass(frozen=True)
class BankKind:
    """A way of making a bank: kind(capacity, dim, dtype, device, max_age=…), with the defaults of `RingBank`."""

    name: str
    create: Callable[..., Bank]
    exact: bool = True  # finds what the oracle finds; otherwise perhaps others, but valid ones

    def __call__(self, *arguments: object, **options: object) -> Bank:
        return self.create(*arguments, **options)

    def __str__(self) -> str:
        return self.name


def _ivf(capacity: int, *arguments: object, segments: int, **options: object) -> Bank:
    segments = max(1, min(segments, capacity))
    lists = max(1, min(4, -(-capacity // segments)))
    return IvfBank(capacity, *arguments, lists=lists, segments=segments, **options)


BANKS = [
    BankKind("reference", ReferenceBank),
    BankKind("flat-faiss", partial(FlatBank, engine="faiss")),
    BankKind("flat-torch", partial(FlatBank, engine="torch")),
    BankKind("scan-bf16", Bf16ScanBank),
    BankKind("scan-int8", Int8ScanBank, exact=False),
    BankKind("scan-pq", PqScanBank, exact=False),
    BankKind("ivf", partial(_ivf, segments=1), exact=False),
    BankKind("ivf-segments", partial(_ivf, segments=3), exact=False),
]
