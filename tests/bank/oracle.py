"""A FIFO bank as simple as possible, and the comparison of a bank with it.

Shapes: N capacity, M pushed vectors, B queries, K neighbours, D dimensions.
"""

from collections import deque

import numpy as np
import torch
from torch import Tensor

from msf_faiss.bank import Bank

DIM = 16


class Oracle:
    """A deque of (sequence number, vector as stored, id), and a search that sorts all entries."""

    def __init__(self, capacity: int, dtype: torch.dtype, max_age: int | None = None) -> None:
        self.entries: deque[tuple[int, Tensor, int]] = deque(maxlen=capacity)
        self.capacity, self.dtype, self.max_age, self.pushed = capacity, dtype, max_age, 0

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        for embedding, index in zip(embeddings.detach().cpu().to(self.dtype), ids.tolist(), strict=True):
            self.entries.append((self.pushed, embedding, index))
            self.pushed += 1

    def resized(self, capacity: int, pushed: int) -> "Oracle":
        """Return an oracle of another capacity with the newest entries, which are the last of `pushed`."""
        other = Oracle(capacity, self.dtype, self.max_age)
        kept = list(self.entries)[-capacity:]
        other.pushed = pushed - len(kept)
        for _, vector, index in kept:
            other.push(vector.unsqueeze(0), torch.tensor([index]))
        return other

    @property
    def searchable(self) -> int:
        """Number of entries that are not older than `max_age`."""
        return len(self.entries) if self.max_age is None else min(len(self.entries), self.max_age + 1)

    def search(self, query: Tensor, k: int) -> list[tuple[float, int, int, int]]:
        """Return (similarity, slot, id, age) of the best k, ties youngest first."""
        stored = query.detach().cpu().to(self.dtype).double()
        live = list(self.entries)[len(self.entries) - self.searchable :]
        vectors = torch.stack([vector.double() for _, vector, _ in live]) if live else torch.empty(0, len(stored))
        similarities = (vectors * stored).sum(dim=1).float().tolist()
        scored = sorted(
            ((similarity, number, index) for similarity, (number, _, index) in zip(similarities, live, strict=True)),
            reverse=True,
        )
        return [(s, number % self.capacity, index, self.pushed - 1 - number) for s, number, index in scored[:k]]


def unit(rng: np.random.Generator, rows: int, dim: int = DIM) -> Tensor:
    """Return random unit vectors [rows, dim] float32."""
    vectors = torch.from_numpy(rng.standard_normal((rows, dim)).astype(np.float32))
    return torch.nn.functional.normalize(vectors, dim=1)


def assert_agree(bank: Bank, oracle: Oracle, queries: Tensor, k: int, *, exact: bool = True) -> None:
    """Assert that the bank returns the oracle's neighbours, bit for bit.

    A bank that is not `exact` may return others: as many, distinct, none too old, with the oracle's similarities and in
    the oracle's order.
    """
    assert len(bank) == len(oracle.entries)
    assert bank.pushed == oracle.pushed
    found = bank.search(queries.to(bank.device), k)
    kept = min(k, oracle.searchable)
    assert found.similarities.shape == found.slots.shape == (len(queries), kept)
    assert found.similarities.dtype == torch.float32
    assert found.slots.dtype == torch.int64
    ids, ages, vectors = bank.ids(found.slots), bank.age(found.slots), bank.reconstruct(found.slots)
    stored = {number % oracle.capacity: vector for number, vector, _ in oracle.entries}
    for row, query in enumerate(queries):
        expected = oracle.search(query, kept if exact else oracle.searchable)
        slots = found.slots[row].tolist()
        if not exact:
            assert len(set(slots)) == kept
            expected = [each for each in expected if each[1] in slots]
        assert slots == [slot for _, slot, _, _ in expected]
        assert found.similarities[row].tolist() == [similarity for similarity, _, _, _ in expected]
        assert ids[row].tolist() == [index for _, _, index, _ in expected]
        assert ages[row].tolist() == [age for _, _, _, age in expected]
        if slots:
            assert torch.equal(vectors[row].cpu(), torch.stack([stored[slot] for slot in slots]).float())
    if kept:
        mean = torch.stack([vectors[row].double().mean(dim=0) for row in range(len(queries))])
        # A float32 mean of at most 64 numbers below 1 in size.
        torch.testing.assert_close(bank.mean_of(found.slots).double(), mean, rtol=0, atol=1e-6)
