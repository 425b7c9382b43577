"""All kinds of banks that the contract and property tests compare with the oracle, with limits for small banks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from msf_faiss.bank import Bank, FlatBank, IvfBank, ReferenceBank, RingSpec
from msf_faiss.bank.ivf.segments import SegmentedLists
from msf_faiss.bank.parallel import ReplicatedBank, ShardedBank
from msf_faiss.bank.scan import SCAN_BANKS, ScanLimits
from msf_faiss.distributed.ranks import ALONE
from msf_faiss.search.faiss_engines import FaissCpu, FaissCuda
from msf_faiss.search.faiss_setup import has_gpu
from msf_faiss.search.torch_engine import TorchEngine

# So that banks of a few dozen entries scan. FAISS trains 4-bit codes on no fewer than 16 entries.
SMALL = ScanLimits(newest=8, group=2, first_groups=2, most_groups=8, pause=0, training=16)


@dataclass(frozen=True)
class BankKind:
    """A way to create a bank: kind(capacity, dim, dtype, device, max_age=…), the arguments of `RingSpec`."""

    name: str
    create: Callable[[RingSpec], Bank]
    exact: bool = True  # returns what the oracle returns; otherwise may return other entries
    indexed: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __call__(self, *arguments: object, **options: object) -> Bank:
        return self.create(RingSpec(*arguments, **options))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.name


def _flat(spec: RingSpec, engine: str) -> Bank:
    engines = {
        "faiss": FaissCpu(tile=16) if spec.device == "cpu" else FaissCuda(),
        "torch": TorchEngine(),
        "streams": FaissCuda(4, least_rows=16),
    }
    return FlatBank(spec, engine=engines[engine])


def _fastest(spec: RingSpec) -> Bank:
    bank = FlatBank(spec)
    bank.use_fastest_engine(batch=8, k=3)
    return bank


def _scan(spec: RingSpec, scan: str) -> Bank:
    return SCAN_BANKS[scan](spec, limits=SMALL)


def _ivf(spec: RingSpec, segments: int) -> Bank:
    segments = max(1, min(segments, spec.capacity))
    lists = max(1, min(4, -(-spec.capacity // segments)))
    return IvfBank(spec, lists=lists, segments=segments, exact_below=16)


BANKS = [
    BankKind("reference", ReferenceBank),
    BankKind("flat-faiss", partial(_flat, engine="faiss")),
    BankKind("flat-torch", partial(_flat, engine="torch")),
    BankKind("flat-streams", partial(_flat, engine="streams"), devices=("cuda",) if has_gpu() else ()),
    BankKind("flat-fastest", _fastest),
    BankKind("scan-bf16", partial(_scan, scan="bf16"), indexed=True),
    BankKind("scan-int8", partial(_scan, scan="int8"), exact=False, indexed=True),
    BankKind("scan-pq", partial(_scan, scan="pq"), exact=False, indexed=True, devices=("cpu",)),
    BankKind("ivf", partial(_ivf, segments=1), exact=False, indexed=True, devices=("cpu",)),
    BankKind("ivf-segments", partial(_ivf, segments=3), exact=False, indexed=True, devices=("cpu",)),
    BankKind("replicated", lambda spec: ReplicatedBank(FlatBank(spec), ALONE)),
    BankKind("sharded", lambda spec: ShardedBank(FlatBank, spec, ALONE)),  # test_parallel.py has more ranks
]

ON_CPU = [kind for kind in BANKS if "cpu" in kind.devices]

PLACES = [
    pytest.param(kind, device, id=f"{kind}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for kind in BANKS
    for device in kind.devices
    if device == "cpu" or torch.cuda.is_available()
]


@contextmanager
def count_indexed_queries() -> Iterator[list[int]]:
    """Yield a list that receives the number of queries of each search with an index."""
    counts: list[int] = []

    def counting(search: Callable[..., object]) -> Callable[..., object]:
        def search_and_count(self: object, queries: Tensor, *arguments: object) -> object:
            counts.append(len(queries))
            return search(self, queries, *arguments)

        return search_and_count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SCAN_BANKS["bf16"], "_search", counting(SCAN_BANKS["bf16"]._search))
        for scan in ("int8", "pq"):
            patch.setattr(SCAN_BANKS[scan], "_scan", counting(SCAN_BANKS[scan]._scan))  # type: ignore[attr-defined]
        patch.setattr(SegmentedLists, "search", counting(SegmentedLists.search))
        yield counts
