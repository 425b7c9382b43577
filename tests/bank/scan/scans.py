"""Vectors, pushes and comparisons for the tests of the scanning banks."""

import numpy as np
import pytest
import torch
from torch import Tensor

from msf_faiss.bank import Bank, RingSpec
from msf_faiss.bank.scan import SCAN_BANKS, ScanBank

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def create(scan: str, *arguments: object, **options: object) -> ScanBank:
    """Create a bank by the value of `bank.scan` and the arguments of `RingSpec`."""
    return SCAN_BANKS[scan](RingSpec(*arguments, **options))  # type: ignore[arg-type]


def unit(rows: int, dim: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((rows, dim)).astype(np.float32)), dim=1)


def crowded(rows: int, dim: int, spread: float, seed: int = 0) -> Tensor:
    """Return unit vectors around one centre, closer together the smaller `spread` is."""
    return torch.nn.functional.normalize(unit(1, dim, seed=5) + spread * unit(rows, dim, seed), dim=1)


def clustered(rows: int, dim: int, seed: int = 0) -> Tensor:
    """Return unit vectors in 200 clusters, whose centres do not depend on the seed."""
    rng = np.random.default_rng(seed)
    centres = unit(200, dim, seed=99)[torch.from_numpy(rng.integers(0, 200, rows))]
    return torch.nn.functional.normalize(centres + 0.7 * unit(rows, dim, seed=seed + 1), dim=1)


def push(bank: Bank, vectors: Tensor) -> None:
    """Push parts, because the last push is searched exactly."""
    for part in vectors.split(250):
        push_at_once(bank, part)


def push_at_once(bank: Bank, vectors: Tensor) -> None:
    bank.push(vectors.to(bank.device), torch.arange(bank.pushed, bank.pushed + len(vectors), device=bank.device))


def cloned_state(bank: Bank) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in bank.state_dict().items()}


def assert_same_neighbors(bank: Bank, reference: Bank, queries: Tensor, k: int) -> None:
    found, expected = bank.search(queries.to(bank.device), k), reference.search(queries.to(reference.device), k)
    assert torch.equal(found.slots.cpu(), expected.slots.cpu())
    assert torch.equal(found.similarities.cpu(), expected.similarities.cpu())


def recall(bank: Bank, queries: Tensor, k: int) -> float:
    found, exact = bank.search(queries, k).slots, bank.search_exactly(queries, k).slots
    return float((found.unsqueeze(2) == exact.unsqueeze(1)).any(dim=2).double().mean())
