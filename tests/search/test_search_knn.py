"""Exact nearest neighbours between two tensors against a full sort."""

import numpy as np
import pytest
import torch
from torch import Tensor

from msf_faiss.search.knn import knn


def unit(rows: int, dim: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((rows, dim)).astype(np.float32)), dim=1)


@pytest.mark.parametrize("k", [1, 20, 200, 5000])
def test_knn_matches_full_sort(k: int) -> None:
    base, queries = unit(700, 24), unit(33, 24, 1)
    base[13] = base[600]  # a tie
    queries = torch.cat([queries, base[600:601]])
    found = knn(queries, base, k)
    every = (queries.double().unsqueeze(1) * base.double()).sum(2).float()
    similarities, rows = every.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.slots, rows[:, :k])
    assert torch.equal(found.similarities, similarities[:, :k])


def test_knn_in_empty_base() -> None:
    assert knn(unit(2, 8), torch.empty(0, 8), 3).slots.shape == (2, 0)


def test_invalid_arguments_raise_value_error() -> None:
    with pytest.raises(ValueError, match="must be"):
        knn(unit(2, 8), unit(5, 7), 1)
    with pytest.raises(ValueError, match="float32"):
        knn(unit(2, 8).double(), unit(5, 8).double(), 1)
    with pytest.raises(ValueError, match="at least 1"):
        knn(unit(2, 8), unit(5, 8), 0)
    with pytest.raises(ValueError, match=r"k must be an integer, found 2\.5"):
        knn(unit(2, 8), unit(5, 8), 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"base must be a dense torch tensor, found numpy\.ndarray"):
        knn(unit(2, 8), unit(5, 8).numpy(), 1)
    assert knn(unit(2, 8), unit(5, 8), np.int64(3)).slots.shape == (2, 3)
