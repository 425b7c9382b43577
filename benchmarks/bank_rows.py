"""Bank steps to compare: reimplementations of other projects' formulas, and the banks of msf-faiss.

A step stores M new embeddings, finds the neighbours of each among all stored ones, and computes what the loss needs.
The other implementations share a plain ring, in which each writes the same vectors to the same slots. Each bank of
msf-faiss has its own ring.

Shapes: N slots, B queries, K neighbours, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from msf_faiss.bank import Bank, create_bank
from msf_faiss.config import BankConfig, FlatBankConfig, IvfBankConfig, IvfConfig, ScanBankConfig
from msf_faiss.search.faiss_setup import faiss, gpu_resources

Dtype = Literal["float32", "float16", "bfloat16"]

YARDSTICKS = ("authors", "faiss")


class Work(NamedTuple):
    """Minimum work of a search, for comparison with the ceilings of the machine."""

    flops: float
    precision: str  # of the multiplications; key of a ceiling
    read: float  # bytes


class Row(Protocol):
    """An implementation of the step, in three parts timed one by one. Vectors are [B, D] on the ring's device."""

    @property
    def ring(self) -> Tensor:
        """The entries that are searched, [N, D]."""

    def push(self, vectors: Tensor, ids: Tensor, start: int) -> None:
        """Store `vectors` with `ids`, [B], after `start` earlier vectors."""

    def search(self, queries: Tensor, k: int) -> Tensor:
        """Return the slots of the neighbours, [B, K]."""

    def mean(self, slots: Tensor) -> Tensor:
        """Return what the loss needs of the neighbours of the last search."""

    def work(self, batch: int) -> Work | None:
        """Return the minimum work of a search with `batch` queries; None if it depends on the data."""


class PlainRing:
    """A ring without a counter, so that several rows can write the same vectors to it."""

    def __init__(self, capacity: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.entries = torch.zeros(capacity, dim, dtype=dtype, device=device)  # [N, D]

    def write(self, vectors: Tensor, start: int) -> None:
        """Write at most N `vectors` to the slots after `start` earlier vectors."""
        start, count = start % self.entries.shape[0], vectors.shape[0]
        before_wrap = min(count, self.entries.shape[0] - start)
        self.entries[start : start + before_wrap].copy_(vectors[:before_wrap])
        self.entries[: count - before_wrap].copy_(vectors[before_wrap:])


class _Plain:
    """Base of the rows on the plain ring."""

    def __init__(self, ring: PlainRing) -> None:
        self._ring = ring

    @property
    def ring(self) -> Tensor:
        return self._ring.entries

    def push(self, vectors: Tensor, ids: Tensor, start: int) -> None:
        self._ring.write(vectors, start)

    def work(self, batch: int) -> Work | None:
        read = float(self.ring.numel() * self.ring.element_size())
        return Work(2.0 * batch * self.ring.numel(), str(self.ring.dtype).removeprefix("torch."), read)


class Authors(_Plain):
    """The authors' step: clone the queue, distances of targets and queries to all entries, top-k, gather.

    `mean` returns the distances averaged over the neighbours, [B]. The authors' query is the embedding of another view;
    here it is the target itself, which costs the same.
    """

    def search(self, queries: Tensor, k: int) -> Tensor:
        self._queries = queries.to(self.ring.dtype)
        self._targets = self.ring.clone()
        distances = 2 - 2 * torch.einsum("bc,kc->bk", self._queries, self._targets)  # [B, N]
        return distances.topk(k, dim=1, largest=False).indices

    def mean(self, slots: Tensor) -> Tensor:
        distances = 2 - 2 * torch.einsum("bc,kc->bk", self._queries, self._targets)  # [B, N]
        del self._targets
        return distances.gather(1, slots).sum(dim=1) / slots.shape[1]


class Torch(_Plain):
    """A matrix product and a top-k."""

    def search(self, queries: Tensor, k: int) -> Tensor:
        return (queries.to(self.ring.dtype) @ self.ring.T).topk(k, dim=1).indices

    def mean(self, slots: Tensor) -> Tensor:
        return self.ring[slots].float().mean(dim=1)  # [B, D]


class Lightly(_Plain):
    """lightly's nearest-neighbour memory bank: clone and normalise the bank, all similarities, argmax (k = 1)."""

    def search(self, queries: Tensor, k: int) -> Tensor:
        self._bank = self.ring.clone()
        similarities = torch.einsum(
            "nd,md->nm", normalize(queries.to(self.ring.dtype)), normalize(self._bank)
        )  # [B, N]
        return similarities.argmax(dim=1, keepdim=True)

    def mean(self, slots: Tensor) -> Tensor:
        found = self._bank.index_select(0, slots[:, 0])  # [B, D]
        del self._bank
        return found


class Faiss(_Plain):
    """FAISS's exact search alone; push and mean do nothing."""

    def push(self, vectors: Tensor, ids: Tensor, start: int) -> None:
        pass

    def search(self, queries: Tensor, k: int) -> Tensor:
        metric = faiss.METRIC_INNER_PRODUCT
        if self.ring.is_cuda:
            device = torch.cuda.current_device()
            resources = gpu_resources(self.ring.device)
            queries = queries.to(self.ring.dtype)
            slots: Tensor = faiss.knn_gpu(resources, queries, self.ring, k, metric=metric, device=device)[1]
            return slots
        return torch.from_numpy(faiss.knn(queries.numpy(), self.ring.numpy(), k, metric=metric)[1])

    def mean(self, slots: Tensor) -> Tensor:
        return slots


class Ours:
    """A bank of msf-faiss, through its public methods."""

    def __init__(self, config: BankConfig, dim: int, device: torch.device) -> None:
        self.bank: Bank = create_bank(config, dim=dim, device=device)
        self._config = config

    @property
    def ring(self) -> Tensor:
        return self.bank.state_dict()["embeddings"]

    def push(self, vectors: Tensor, ids: Tensor, start: int) -> None:
        self.bank.push(vectors, ids)

    def search(self, queries: Tensor, k: int) -> Tensor:
        return self.bank.search(queries, k).slots

    def mean(self, slots: Tensor) -> Tensor:
        return self.bank.mean_of(slots)

    def work(self, batch: int) -> Work | None:
        numbers = len(self.bank) * self.bank.dim
        match self._config:
            case ScanBankConfig(scan="bf16"):
                return Work(2.0 * batch * numbers, "bfloat16", 2.0 * numbers)
            case ScanBankConfig(scan="int8"):
                return Work(2.0 * batch * numbers, "int8", 1.0 * numbers)
            case FlatBankConfig():
                converted = (
                    self.bank.device.type == "cpu" and self._config.engine == "faiss"
                )  # FAISS reads float32 there
                precision = "float32" if converted else self._config.dtype
                return Work(2.0 * batch * numbers, precision, float(numbers * self.bank.dtype.itemsize))
        return None


PLAIN: dict[str, Callable[[PlainRing], Row]] = {"authors": Authors, "torch": Torch, "lightly": Lightly, "faiss": Faiss}

OURS: dict[str, Callable[[Dtype, int, int], BankConfig]] = {
    "flat": lambda dtype, n, k: FlatBankConfig(capacity=n, k=k, dtype=dtype, engine="faiss"),
    "flat bfloat16": lambda dtype, n, k: FlatBankConfig(capacity=n, k=k, dtype="bfloat16", engine="faiss"),
    "flat torch": lambda dtype, n, k: FlatBankConfig(capacity=n, k=k, dtype=dtype, engine="torch"),
    "scan bf16": lambda dtype, n, k: ScanBankConfig(capacity=n, k=k, dtype=dtype, scan="bf16"),
    "scan int8": lambda dtype, n, k: ScanBankConfig(capacity=n, k=k, dtype=dtype, scan="int8"),
    "scan pq": lambda dtype, n, k: ScanBankConfig(capacity=n, k=k, dtype=dtype, scan="pq"),
    "ivf": lambda dtype, n, k: IvfBankConfig(capacity=n, k=k, dtype=dtype),
    "ivf 0.99": lambda dtype, n, k: IvfBankConfig(capacity=n, k=k, dtype=dtype, min_recall=0.99),
    "ivf segments=4": lambda dtype, n, k: IvfBankConfig(capacity=n, k=k, dtype=dtype, ivf=IvfConfig(segments=4)),
}

ROWS = (*PLAIN, *OURS)
