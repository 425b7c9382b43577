"""Retrieval overlapped with the caller; test_step.py compares its numbers."""

import threading

import pytest
import torch
from torch import Tensor

from msf_faiss.bank import FlatBank, RingSpec
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.train.clock import Clock
from msf_faiss.train.overlap import SequentialRetriever, ThreadedRetriever, create_retriever

CPU = torch.device("cpu")


class SlowBank(FlatBank):
    """Its search waits for permission."""

    allowed = threading.Event()

    def search(self, queries: Tensor, k: int) -> Neighbors:
        assert self.allowed.wait(10), "the caller waits for the search"
        return super().search(queries, k)


def unit(rows: int) -> Tensor:
    vectors = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
    return torch.nn.functional.normalize(vectors, dim=1)


def test_threaded_retrieval_does_not_block_the_caller() -> None:
    bank, clock = SlowBank(RingSpec(20, 8)), Clock(CPU)
    retrieval = ThreadedRetriever(bank)(unit(6), torch.arange(6), 3, clock)
    bank.allowed.set()
    means, found = retrieval.result()
    plain = FlatBank(RingSpec(20, 8))
    expected_means, expected = SequentialRetriever(plain)(unit(6), torch.arange(6), 3, clock).result()
    assert torch.equal(means, expected_means)
    assert torch.equal(found.slots, expected.slots)
    assert clock.read()[1].keys() == {"push", "search"}


def test_result_raises_the_error_of_the_thread() -> None:
    retrieval = ThreadedRetriever(FlatBank(RingSpec(20, 8)))(unit(6), torch.arange(5), 3, Clock(CPU))
    with pytest.raises(ValueError, match="ids"):
        retrieval.result()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_means_of_masked_targets_are_nan(value: float) -> None:
    """On CUDA the bank masks them, so nothing else would tell the loss."""
    bank, vectors = FlatBank(RingSpec(20, 8)), unit(6)
    bank.masks = True
    vectors[2, 3] = value
    means, found = SequentialRetriever(bank)(vectors, torch.arange(6), 3, Clock(CPU)).result()
    assert means.isnan().any(dim=1).tolist() == [False, False, True, False, False, False]
    assert ((found.slots >= 0) & (found.slots < 6)).all()


def test_retriever_depends_on_the_devices() -> None:
    assert isinstance(create_retriever(FlatBank(RingSpec(20, 8)), CPU), SequentialRetriever)
    assert isinstance(create_retriever(FlatBank(RingSpec(20, 8)), torch.device("cuda", 0)), ThreadedRetriever)


def test_retrieval_thread_uses_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr("msf_faiss.train.overlap.set_threads", threads.append)
    ThreadedRetriever(FlatBank(RingSpec(20, 8)))(unit(6), torch.arange(6), 3, Clock(CPU)).result()
    assert threads == [torch.get_num_threads()]
