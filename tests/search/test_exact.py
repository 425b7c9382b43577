"""Exact search on top of engines that are imprecise, and report by how much."""

import pytest
import torch
from torch import Tensor

from msf_faiss.search.canonical import rescore
from msf_faiss.search.exact import MARGIN, Proposal, search_exactly, unproven
from msf_faiss.search.faiss_engines import FaissCpu
from msf_faiss.search.torch_engine import TorchEngine

N, DIM = 4000, 32


class RoughEngine:
    """Adds noise of up to `noise` to the similarities, so that it proposes wrong rows."""

    name = "rough"

    def __init__(self, noise: float) -> None:
        self.noise = noise
        self.calls: list[tuple[int, int, int]] = []  # queries, rows and count of each call

    def error(self, dim: int) -> float:
        return self.noise

    def propose(self, queries: Tensor, rows: Tensor, count: int) -> Proposal:
        self.calls.append((queries.shape[0], rows.shape[0], count))
        generator = torch.Generator().manual_seed(rows.shape[0])
        noise = self.noise * (2 * torch.rand(rows.shape[0], generator=generator) - 1)
        similarities, slots = (queries.float() @ rows.float().T + noise).topk(count)
        all_of_them = count == rows.shape[0]
        return Proposal(slots, torch.full_like(similarities[:, 0], -torch.inf) if all_of_them else similarities[:, -1])


def unit(rows: int, seed: int, dim: int = DIM) -> Tensor:
    vectors = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def age_of(slots: Tensor) -> Tensor:
    return N - 1 - slots


def truth(queries: Tensor, entries: Tensor, ranges: list[tuple[int, int]], k: int) -> tuple[Tensor, Tensor]:
    every = torch.cat([torch.arange(*each) for each in ranges]).expand(len(queries), -1)
    return rescore(queries, entries, every, age_of(every), k)


@pytest.mark.parametrize("ranges", [[(0, N)], [(0, 700), (2900, N)], [(0, 1), (1, 5)], [(3, 4)]], ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_rough_engine_proposes_more_until_result_is_proven(noise: float, ranges: list[tuple[int, int]]) -> None:
    entries, queries, engine = unit(N, 0), unit(20, 1), RoughEngine(noise)
    k = min(5, sum(stop - start for start, stop in ranges))
    found = search_exactly(engine, queries, entries, ranges, age_of, k)
    for ours, expected in zip(found, truth(queries, entries, ranges, k), strict=True):
        assert torch.equal(ours, expected)
    first = engine.calls[: len(ranges)]
    assert [(count, rows) for count, rows, _ in first] == [(20, stop - start) for start, stop in ranges]
    assert all(count <= min(k + MARGIN, rows) for _, rows, count in first)
    assert (len(engine.calls) > len(ranges)) == (noise > 0 and ranges[0] != (0, 1) and ranges != [(3, 4)])


def test_noise_of_that_test_hides_neighbors() -> None:
    entries, queries = unit(N, 0), unit(20, 1)
    proposed = RoughEngine(0.2).propose(queries, entries, 5 + MARGIN).slots
    naive = rescore(queries, entries, proposed, age_of(proposed), 5)
    assert not torch.equal(naive.slots, truth(queries, entries, [(0, N)], 5)[1])


def test_only_doubtful_queries_are_searched_again() -> None:
    """One query has many copies, the others have none."""
    entries, queries = unit(N, 0), unit(20, 1)
    entries[100:160] = queries[7]
    engine = RoughEngine(1e-6)
    found = search_exactly(engine, queries, entries, [(0, N)], age_of, 5)
    assert found.slots[7].tolist() == [159, 158, 157, 156, 155]
    assert engine.calls == [(20, N, 13), (1, N, 104)]
    for ours, expected in zip(found, truth(queries, entries, [(0, N)], 5), strict=True):
        assert torch.equal(ours, expected)


def test_widening_ends_if_all_entries_tie() -> None:
    """Only proposing all entries would be a proof."""
    entries = unit(1, 0).expand(N, -1).contiguous()
    engine = RoughEngine(1e-6)
    found = search_exactly(engine, entries[:2], entries, [(0, N)], age_of, 5)
    assert [count for _, _, count in engine.calls] == [13, 104, 832, 5 + 1024]
    # More entries tie than were proposed, so any may be returned; each once, youngest first.
    assert found.similarities.unique().numel() == 1
    assert all(row == sorted(set(row), reverse=True) for row in found.slots.tolist())


def test_one_doubtful_range_is_enough() -> None:
    """The bound is the greatest of the ranges' bounds."""
    entries, queries = unit(N, 0), unit(1, 1)
    entries[3000:3050] = queries[0]
    for ranges in ([(0, 500), (2000, N)], [(2500, N), (0, 500)]):
        found = search_exactly(RoughEngine(1e-6), queries, entries, ranges, age_of, 5)
        assert found.slots[0].tolist() == [3049, 3048, 3047, 3046, 3045]


def test_equal_after_rounding_is_unproven() -> None:
    """Ties are ordered by age, so an equal entry may come first."""
    kth = torch.tensor([0.5, 0.5, 0.5, 0.5, torch.nan, 0.5])
    bound = torch.tensor([0.5, 0.49, 0.5 - 2.0**-23, -torch.inf, 0.1, torch.nan])
    assert unproven(kth, bound, 0.0).tolist() == [True, False, True, False, True, True]
    assert unproven(kth, bound, 0.02).tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize("engine", [FaissCpu(), TorchEngine()], ids=["faiss", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_engine_error_is_within_its_bound(engine: FaissCpu | TorchEngine, dtype: torch.dtype) -> None:
    """Candidates and bound against float64, also for nearly equal vectors."""
    crowd = torch.nn.functional.normalize(unit(1, 3, 512) + 1e-4 * unit(500, 4, 512), dim=1)
    rows = torch.cat([unit(1500, 5, 512), crowd]).to(dtype)
    queries = torch.cat([crowd[:3], unit(5, 6, 512)]).to(dtype)
    exact = queries.double() @ rows.double().T  # [B, n]
    for count in (1, 13, 400):
        proposal = engine.propose(queries, rows, count)
        assert all(len(set(row)) == len(row) >= count for row in proposal.slots.tolist())
        others = exact.scatter(1, proposal.slots, -torch.inf).amax(dim=1)  # best of the others
        assert (others <= proposal.bound.double() + engine.error(512)).all()
        # Nor is the bound too loose for proofs; products may be rounded to the dtype of the rows.
        kth = exact.topk(count).values[:, -1]
        assert (proposal.bound.double() <= kth + engine.error(512) + torch.finfo(dtype).eps).all()
    everything = engine.propose(queries, rows, len(rows))
    assert (everything.bound == -torch.inf).all()
    assert all(sorted(row) == list(range(len(rows))) for row in everything.slots.tolist())
