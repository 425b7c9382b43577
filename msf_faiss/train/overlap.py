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
        """Wait for the retrieval and return it; may be called again.

        Between a bank and networks on the same GPU only the device waits, otherwise the host does.

        Raises:
            Exception: if the retrieval failed.
        """


class Retriever(Protocol):
    """Starts the retrieval of a step."""

    def __call__(self, targets: Tensor, ids: Tensor, k: int, clock: Clock) -> Retrieval:
        """Push `targets` [B, D] with their `ids` [B], on the bank's device, and search the bank for them."""


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

    def __call__(self, targets: Tensor, ids: Tensor, k: int, clock: Clock) -> StreamRetrieval:
        caller = torch.cuda.current_stream(self._bank.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            retrieved = _retrieve(self._bank, targets, ids, k, clock)
        # The allocator must not reuse memory that the other stream is still reading.
        for tensor in (targets, ids):
            tensor.record_stream(self._stream)
        return StreamRetrieval(retrieved, self._stream, caller)


class StreamRetrieval(NamedTuple):
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
        device = targets.device
        on_host, wait_for_copy = _to_host(targets)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def retrieve() -> Retrieved:
            wait_for_copy()
            means, neighbors = _retrieve(self._bank, on_host, ids, k, clock)
            with torch.cuda.stream(stream):  # does nothing if there is none
                return Retrieved(means.pin_memory().to(device, non_blocking=True) if stream else means, neighbors)

        return self._thread.submit(retrieve)


def _retrieve(bank: Bank, targets: Tensor, ids: Tensor, k: int, clock: Clock) -> Retrieved:
    """Push before searching, so that each target is its own nearest neighbour (MSF, ICCV 2021, section 3)."""
    with clock.on_device("push", bank.device):
        bank.push(targets, ids)
    with clock.on_device("search", bank.device):
        neighbors = bank.search(targets, k)  # [B, K]
        means = bank.mean_of(neighbors.slots)  # [B, D]
    return Retrieved(means, neighbors)


def _to_host(tensor: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """Start copying `tensor` to host memory; returns the copy, and a function that waits until it is complete."""
    if tensor.device.type == "cpu":
        return tensor, lambda: None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    return copy, event.synchronize
