"""Canonical neighbours: the same ids, order and bits, whichever engine proposes the candidates.

Shapes: B queries, C candidates of each, K neighbours, N rows, D dimensions.
"""

import torch
from torch import Tensor

from msf_faiss.search.neighbors import Neighbors

_CPU_SCRATCH = 1 << 18  # float64 elements rescored at a time: 2 MiB fit the cache (with 13 MiB a fifth as fast)
_GPU_SCRATCH = 1 << 24  # 128 MiB: one or two launches for a batch


def rescore(
    queries: Tensor, rows: Tensor, candidates: Tensor, ages: Tensor, k: int, *, valid: Tensor | None = None
) -> Neighbors:
    """Return the best k candidates of each query, in canonical order.

    The similarity of each pair is computed separately in float64 and rounded to float32, so its bits depend neither on
    the rest of the batch nor on the number of rows nor on the engine. Ties are ordered youngest first.

    Args:
        queries: [B, D].
        rows: [N, D], of the same dtype.
        candidates: [B, C] int64 row numbers, C >= k; the valid ones of a query are distinct.
        ages: [B, C] int64 ages of the candidates; distinct for a query.
        k: neighbours to return.
        valid: [B, C] bool; invalid candidates may be any row, get similarity -inf and come last. None: all are valid.
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
    return order_canonically(similarities, candidates, ages, k)


def order_canonically(similarities: Tensor, candidates: Tensor, ages: Tensor, k: int) -> Neighbors:
    """Return the first k of candidates [B, C] by similarity [B, C] and, where equal, by age [B, C], youngest first."""
    by_age = ages.argsort(dim=1, stable=True)
    by_similarity = similarities.gather(1, by_age).argsort(dim=1, stable=True, descending=True)
    order = by_age.gather(1, by_similarity)[:, :k]  # [B, K]
    return Neighbors(similarities.gather(1, order), candidates.gather(1, order))


def merge(young: Neighbors, old: Neighbors, k: int) -> Neighbors:
    """Return the best k of two canonical lists, of which one has the younger entries."""
    similarities = torch.cat([young.similarities, old.similarities], dim=1)  # [B, K + C]
    order = similarities.argsort(dim=1, stable=True, descending=True)[:, :k]
    return Neighbors(similarities.gather(1, order), torch.cat([young.slots, old.slots], dim=1).gather(1, order))
