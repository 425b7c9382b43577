"""Canonical neighbours: whatever proposes candidates, the same answer in the same order with the same bits.

Shapes: B queries, C candidates of each, K neighbours kept, N rows, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msf_faiss.search.neighbors import Neighbors

_CPU_SCRATCH = 1 << 18  # float64 elements that re-scoring holds at a time: 2 MiB fit the cache (13: a fifth as fast)
_GPU_SCRATCH = 1 << 24  # 128 MiB, so that a step is one or two launches


def canonical(
    queries: Tensor, rows: Tensor, candidates: Tensor, ages: Tensor, k: int, *, valid: Tensor | None = None
) -> Neighbors:
    """The best k of each query's candidates.

    Each pair's similarity is computed by itself in float64 and rounded to float32, so that its bits do not depend on
    what else is in the batch, on the number of rows or on who proposed it; ties go to the youngest.

    Args:
        queries: [B, D].
        rows: [N, D], of the same dtype.
        candidates: [B, C] int64 rows, C >= k, no valid row twice for one query.
        ages: [B, C] int64, their ages; distinct for one query.
        k: neighbours to keep.
        valid: [B, C] bool; the other candidates may be anything, get the similarity -inf and come last. None: all are.
    """
    similarities = torch.empty(candidates.shape, dtype=torch.float32, device=queries.device)  # [B, C]
    scratch = _GPU_SCRATCH if queries.is_cuda else _CPU_SCRATCH
    step = max(1, scratch // max(1, candidates.shape[1] * queries.shape[1]))
    for start in range(0, queries.shape[0], step):
        part = slice(start, start + step)
        chosen = rows.index_select(0, candidates[part].flatten()).view(*candidates[part].shape, -1)  # [b, C, D]
        similarities[part] = chosen.double().mul_(queries[part].double().unsqueeze(1)).sum(dim=2)
    if valid is not None:
        similarities.masked_fill_(~valid, -torch.inf)
    return ordered(similarities, candidates, ages, k)


def ordered(similarities: Tensor, candidates: Tensor, ages: Tensor, k: int) -> Neighbors:
    """The first k in canonical order, by similarity, of equal ones the youngest: of [B, C] each."""
    by_age = ages.argsort(dim=1, stable=True)
    by_similarity = similarities.gather(1, by_age).argsort(dim=1, stable=True, descending=True)
    order = by_age.gather(1, by_similarity)[:, :k]  # [B, K]
    return Neighbors(similarities.gather(1, order), candidates.gather(1, order))


def merged(young: Neighbors, old: Neighbors, k: int) -> Neighbors:
    """The best k of two canonical lists; of equal ones the young come first."""
    similarities = torch.cat([young.similarities, old.similarities], dim=1)  # [B, K + C]
    order = similarities.argsort(dim=1, stable=True, descending=True)[:, :k]
    return Neighbors(similarities.gather(1, order), torch.cat([young.slots, old.slots], dim=1).gather(1, order))
