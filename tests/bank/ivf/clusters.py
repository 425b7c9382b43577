"""Clustered vectors whose centres may move, and filled banks, for the tests of inverted lists."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from msf_faiss.bank import Bank, IvfBank, RingSpec

DIM = 32
CAPACITY = 3000
BATCH = 128
K = 6
SPEC = RingSpec(CAPACITY, DIM)


class Clusters:
    """Unit vectors around 50 centres, which may turn towards others."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._from, self._to = self._centres(), self._centres()
        self.angle = 0.0  # between the centres and their first positions, in radians

    def draw(self, count: int) -> Tensor:
        along = (self._to * self._from).sum(dim=1, keepdim=True) * self._from
        centres = math.cos(self.angle) * self._from + math.sin(self.angle) * normalize(self._to - along, dim=1)
        noise = torch.randn(count, DIM, generator=self._generator) * 0.5 / DIM**0.5
        return normalize(centres[torch.randint(50, (count,), generator=self._generator)] + noise, dim=1)

    def turn(self) -> None:
        """Continue towards other centres."""
        self._from, self._to, self.angle = self._to, self._centres(), 0.0

    def _centres(self) -> Tensor:
        return normalize(torch.randn(50, DIM, generator=self._generator), dim=1)


def batches(source: Clusters, steps: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        first = start + step * BATCH
        yield source.draw(BATCH), torch.arange(first, first + BATCH)


def drift(source: Clusters, rotations: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the rotation and the vectors of each step while the centres turn to a cosine of .3 in each rotation."""
    steps = CAPACITY // BATCH
    for rotation in range(rotations):
        for step in range(steps):
            source.angle = math.acos(0.3) * (step + 1) / steps
            yield rotation, source.draw(BATCH)
        source.turn()


def filled(steps: int = 60, **options: object) -> IvfBank:
    bank = IvfBank(SPEC, **options)  # type: ignore[arg-type]
    for vectors, ids in batches(Clusters(), steps):
        bank.push(vectors, ids)
    return bank


def cloned_state(bank: Bank) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in bank.state_dict().items()}


def recall(bank: Bank, queries: Tensor) -> float:
    """Ratio of the nearest others that a search returns, for queries that were pushed last."""
    found, exact = bank.search(queries, K).slots, bank.search_exactly(queries, K).slots
    assert torch.equal(exact[:, 0], found[:, 0])  # the queries themselves
    return float((exact[:, 1:].unsqueeze(2) == found.unsqueeze(1)).any(dim=2).float().mean())


def assert_same_neighbors(left: Bank, right: Bank, queries: Tensor, k: int = K) -> None:
    for ours, theirs in zip(left.search(queries, k), right.search(queries, k), strict=True):
        assert torch.equal(ours, theirs)
