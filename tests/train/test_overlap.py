"""The bank beside the forward; that the numbers stay the same is shown in test_train_step."""

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
    """Its search ends only when somebody allows it."""

    allowed = threading.Event()

    def search(self, queries: Tensor, k: int) -> Neighbors:
        assert self.allowed.wait(10), "nobody does anything beside the search"
        return super().search(queries, k)


def unit(rows: int) -> Tensor:
    vectors = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
    return torch.nn.functional.normalize(vectors, dim=1)


def test_a_thread_lets_the_caller_go_on_meanwhile() -> None:
    bank, clock = SlowBank(RingSpec(20, 8)), Clock(CPU)
    retrieval = ThreadedRetriever(bank)(unit(6), torch.arange(6), 3, clock)
    bank.allowed.set()
    means, found = retrieval.result()
    plain = FlatBank(RingSpec(20, 8))
    expected_means, expected = SequentialRetriever(plain)(unit(6), torch.arange(6), 3, clock).result()
    assert torch.equal(means, expected_means)
    assert torch.equal(found.slots, expected.slots)
    assert clock.read()[1].keys() == {"push", "search"}


def test_what_goes_wrong_in_the_thread_is_told_to_who_waits_for_it() -> None:
    retrieval = ThreadedRetriever(FlatBank(RingSpec(20, 8)))(unit(6), torch.arange(5), 3, Clock(CPU))
    with pytest.raises(ValueError, match="ids"):
        retrieval.result()


def test_the_way_follows_from_where_bank_and_networks_are() -> None:
    assert isinstance(create_retriever(FlatBank(RingSpec(20, 8)), CPU), SequentialRetriever)
    assert isinstance(create_retriever(FlatBank(RingSpec(20, 8)), torch.device("cuda", 0)), ThreadedRetriever)


def test_a_thread_has_as_many_threads_as_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr("msf_faiss.train.overlap.set_threads", told.append)
    ThreadedRetriever(FlatBank(RingSpec(20, 8)))(unit(6), torch.arange(6), 3, Clock(CPU)).result()
    assert told == [torch.get_num_threads()]
