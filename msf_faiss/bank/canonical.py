"""Canonical neighbours: whatever proposes candidates, the same answer in the same order with the same bits.

Shapes: B queries, C candidates of each, K neighbours kept, N rows, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msf_faiss.bank.base import Neighbors

_SCRATCH = 1 << 22  # float64 elements that re-scoring may hold at a time: 32 MiB


def canonical(queries: Tensor, rows: Tensor, candidates: Tensor, ages: Tensor, k: int) -> Neighbors:
    """The best k of each query's candidates.

    Each pair's similarity is computed by itself in float64 and rounded to float32, so that its bits do not depend on
    what else is in the batch, on the number of rows or on who proposed it; ties go to the youngest.

    Args:
        queries: [B, D].
        rows: [N, D], of the same dtype.
        candidates: [B, C] int64 rows, C >= k, no row twice for one query.
        ages: [B, C] int64, their ages; distinct for one query.
        k: neighbours to keep.
    """
    similarities = torch.empty(candidates.shape, dtype=torch.float32, device=queries.device)  # [B, C]
    step = max(1, _SCRATCH // max(1, candidates.shape[1] * queries.shape[1]))
    for start in range(0, queries.shape[0], step):
        part = slice(start, start + step)
        pairs = rows[candidates[part]].double() * queries[part].double().unsqueeze(1)  # [b, C, D]
        similarities[part] = pairs.sum(dim=2).float()
    by_age = ages.argsort(dim=1, stable=True)
    by_similarity = similarities.gather(1, by_age).argsort(dim=1, stable=True, descending=True)
    order = by_age.gather(1, by_similarity)[:, :k]  # [B, K]
    return Neighbors(similarities.gather(1, order), candidates.gather(1, order))
