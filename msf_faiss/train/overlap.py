"""A step's use of the bank (push, search, mean of the neighbours), beside the online encoder's forward where that pays.

The bank needs the target embeddings alone, and the forward of the online encoder nothing of the bank's. So that the
method's order (design 1) and every number are the same whether one waits for the other or not.

Shapes: B queries, K neighbours, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from msf_faiss.bank import Bank
from msf_faiss.search.faiss_setup import set_threads
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.train.clock import Clock


class Retrieved(NamedTuple):
    """What a step pulls its queries to."""

    means: Tensor  # [B, D] on the targets' device
    found: Neighbors  # [B, K] on the bank's device


class Retriever(Protocol):
    """Has the bank work for a step."""

    def __call__(self, targets: Tensor, ids: Tensor, k: int, clock: Clock) -> Callable[[], Retrieved]:
        """Push `targets` [B, D] with their `ids` [B], on the bank's device, and search the bank for them.

        Returns:
            What waits for the neighbours: the host if the bank is on another device than the targets, else only the
            device.
        """


def retriever(bank: Bank, device: torch.device) -> Retriever:
    """The way that pays for a bank and networks on `device`."""
    if bank.device.type != device.type:
        return ByThread(bank)
    # On the CPU both would only share the same cores.
    return OnSideStream(bank) if device.type == "cuda" else InTurn(bank)


class InTurn:
    """Everything else waits for the bank."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    def __call__(self, targets: Tensor, ids: Tensor, k: int, clock: Clock) -> Callable[[], Retrieved]:
        retrieved = _retrieve(self._bank, targets, ids, k, clock)
        return lambda: retrieved


class OnSideStream:
    """A bank on CUDA works on a stream of its own."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._stream = torch.cuda.Stream(bank.device)  # type: ignore[no-untyped-call]

    def __call__(self, targets: Tensor, ids: Tensor, k: int, clock: Clock) -> Callable[[], Retrieved]:
        here = torch.cuda.current_stream(self._bank.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            retrieved = _retrieve(self._bank, targets, ids, k, clock)
        # The allocator must not give memory away that the other stream is still using.
        for tensor in (targets, ids):
            tensor.record_stream(self._stream)

        def finish() -> Retrieved:
            here.wait_stream(self._stream)
            for tensor in (retrieved.means, *retrieved.found):
                tensor.record_stream(here)
            return retrieved

        return finish


class ByThread:
    """A bank in host memory works in a thread, while the host has the GPU do the forward."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        # OpenMP counts threads for each thread that asks for them.
        self._thread = ThreadPoolExecutor(1, "bank", initializer=set_threads, initargs=(torch.get_num_threads(),))

    def __call__(self, targets: Tensor, ids: Tensor, k: int, clock: Clock) -> Callable[[], Retrieved]:
        device = targets.device
        on_host, arrived = _to_host(targets)

        def work() -> Retrieved:
            arrived()
            return _retrieve(self._bank, on_host, ids, k, clock)

        pending = self._thread.submit(work)

        def finish() -> Retrieved:
            means, found = pending.result()
            if device.type == "cuda":
                means = means.pin_memory().to(device, non_blocking=True)
            return Retrieved(means, found)

        return finish


def _retrieve(bank: Bank, targets: Tensor, ids: Tensor, k: int, clock: Clock) -> Retrieved:
    """Own embeddings first: each is its own nearest neighbour."""
    with clock.on_device("push", bank.device):
        bank.push(targets, ids)
    with clock.on_device("search", bank.device):
        found = bank.search(targets, k)  # [B, K]
        means = bank.mean_of(found.slots)  # [B, D]
    return Retrieved(means, found)


def _to_host(tensor: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """A copy of `tensor` in host memory, and what waits until it is there."""
    if tensor.device.type == "cpu":
        return tensor, lambda: None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    return copy, event.synchronize
