"""Retrieval: the bank's part of a step (push, search, mean of the neighbours), overlapped with the online forward.

The bank needs only the target embeddings, and the online forward needs nothing from the bank, so every number is the
same with and without overlap.

Shapes: B queries, K neighbours, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from msf_faiss.bank import Bank
from msf_faiss.search.faiss_setup import set_threads
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.train.clock import Clock


class Retrieved(NamedTuple):
    """The regression targets of a step, and the neighbours that they are the means of."""

    means: Tensor  # [B, D] on the device of the target embeddings
    neighbors: Neighbors  # [B, K] on the bank's device


class Retrieval(Protocol):
    """A retrieval in progress."""

    def result(self) -> Retrieved:
        """Wait for the retrieval; may be called again. On one GPU only the device waits, otherwise the host does."""


Retriever = Callable[[Tensor, Tensor, int, Clock], Retrieval]
"""Pushes the target embeddings [B, D] with their ids [B], on the bank's device, and searches k neighbours of each."""


def create_retriever(bank: Bank, device: torch.device) -> Retriever:
    """The fastest retriever for `bank` and networks on `device`."""
    if bank.device.type != device.type:
        return ThreadedRetriever(bank)
    # On a CPU both would compete for the same cores.
    return StreamRetriever(bank) if device.type == "cuda" else SequentialRetriever(bank)


class SequentialRetriever:
    """No overlap: retrieves before it returns."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    def __call__(self, targets: Tensor, ids: Tensor, k: int, clock: Clock) -> Future[Retrieved]:
        retrieval: Future[Retrieved] = Future()
        retrieval.set_result(_retrieve(self._bank, targets, ids, k, clock))
        return retrieval


class StreamRetriever:
    """Retrieves from a bank on CUDA, on a stream of its own."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._stream = torch.cuda.Stream(bank.device)  # type: ignore[no-untyped-call]

    def __call__(self, targets: Tensor, ids: Tensor, k: int, clock: Clock) -> _StreamRetrieval:
        caller = torch.cuda.current_stream(self._bank.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            retrieved = _retrieve(self._bank, targets, ids, k, clock)
        # The allocator must not reuse memory that the other stream is still reading.
        for tensor in (targets, ids):
            tensor.record_stream(self._stream)
        return _StreamRetrieval(retrieved, self._stream, caller)


class _StreamRetrieval(NamedTuple):
    """Work queued on `stream`, for which `caller` has to wait."""

    retrieved: Retrieved
    stream: torch.cuda.Stream
    caller: torch.cuda.Stream

    def result(self) -> Retrieved:
        self.caller.wait_stream(self.stream)
        for tensor in (self.retrieved.means, *self.retrieved.neighbors):
            tensor.record_stream(self.caller)
        return self.retrieved


class ThreadedRetriever:
    """Retrieves from a bank in host memory, in a thread, while the GPU computes."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        # OpenMP counts threads per calling thread.
        self._thread = ThreadPoolExecutor(1, "bank", initializer=set_threads, initargs=(torch.get_num_threads(),))

    def __call__(self, targets: Tensor, ids: Tensor, k: int, clock: Clock) -> Future[Retrieved]:
        if targets.device.type == "cpu":
            return self._thread.submit(_retrieve, self._bank, targets, ids, k, clock)
        stream, copied = torch.cuda.current_stream(targets.device), torch.cuda.Event()  # type: ignore[no-untyped-call]
        on_host = torch.empty(targets.shape, dtype=targets.dtype, pin_memory=True)
        on_host.copy_(targets, non_blocking=True)
        copied.record(stream)

        def retrieve() -> Retrieved:
            copied.synchronize()
            means, neighbors = _retrieve(self._bank, on_host, ids, k, clock)
            with torch.cuda.stream(stream):
                return Retrieved(means.pin_memory().to(targets.device, non_blocking=True), neighbors)

        return self._thread.submit(retrieve)


def _retrieve(bank: Bank, targets: Tensor, ids: Tensor, k: int, clock: Clock) -> Retrieved:
    """Push before searching, so that each target is its own nearest neighbour (MSF, ICCV 2021, section 3)."""
    with clock.on_device("push", bank.device):
        bank.push(targets, ids)
    with clock.on_device("search", bank.device):
        neighbors = bank.search(targets, k)  # [B, K]
        means = bank.mean_of(neighbors.slots)  # [B, D]
        # A bank on CUDA or on several ranks masks targets that are not finite; the loss must still show it.
        means = means.where(neighbors.similarities[:, :1].isfinite(), torch.nan)
    return Retrieved(means, neighbors)
