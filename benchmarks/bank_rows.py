"""What the benchmark compares: steps written anew from others' formulas, and the banks of this project.

A step stores M new embeddings, finds neighbours of each among all that are stored, and makes of them what the loss
needs. The others' steps share one plain ring, in which each writes the same vectors to the same place; each of our
banks holds its own.

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
    """What a search cannot do without, to be compared with the machine's ceilings."""

    flops: float
    precision: str  # of the multiplications; names a ceiling
    read: float  # bytes


class Row(Protocol):
    """One way of doing the step, in three parts that are timed one by one. Vectors are [B, D] on the ring's device."""

    @property
    def ring(self) -> Tensor:
        """[N, D], the entries it searches."""

    def push(self, vectors: Tensor, ids: Tensor, start: int) -> None:
        """Store `vectors` under `ids` [B]; `start` vectors were pushed before."""

    def search(self, queries: Tensor, k: int) -> Tensor:
        """Slots [B, K] of the neighbours."""

    def mean(self, slots: Tensor) -> Tensor:
        """What the loss takes from the neighbours of the last search."""

    def work(self, batch: int) -> Work | None:
        """Of a search of `batch` queries; None where it depends on the data."""


class PlainRing:
    """A ring without a counter of its own, so that several rows can each write the same vectors to it."""

    def __init__(self, capacity: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.entries = torch.zeros(capacity, dim, dtype=dtype, device=device)  # [N, D]

    def write(self, vectors: Tensor, start: int) -> None:
        """Put at most N `vectors` where they belong if `start` were pushed before."""
        start, count = start % self.entries.shape[0], vectors.shape[0]
        before_wrap = min(count, self.entries.shape[0] - start)
        self.entries[start : start + before_wrap].copy_(vectors[:before_wrap])
        self.entries[: count - before_wrap].copy_(vectors[before_wrap:])


class _Plain:
    """What the rows over the plain ring have in common."""

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
    """The step of the method's authors: clone the queue, distances of target and query to all of it, top-k, gather.

    The loss is linear in the targets' neighbours, so `mean` gives the distances averaged over them, [B]; their query is
    another view's embedding, here the target itself, which costs the same.
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
    """Lightly's nearest-neighbour memory bank: clone and normalise the bank, similarity to all, argmax; k is 1."""

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
    """FAISS's brute force as it comes: only the search, so its push and mean do nothing."""

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
    """A bank of this project, through its public methods only."""

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
                converted = self.bank.device.type == "cpu" and self._config.engine == "faiss"  # it reads float32 there
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
