"""Exact nearest neighbours between two tensors."""

import torch
from torch import Tensor

from msf_faiss.search.arguments import as_count, check_tensor
from msf_faiss.search.exact import search_exactly
from msf_faiss.search.faiss_engines import default_engine
from msf_faiss.search.neighbors import Neighbors


def knn(queries: Tensor, base: Tensor, k: int) -> Neighbors:
    """Exact inner-product neighbours of `queries` [B, D] in `base` [N, D], both float32 and on one device.

    Returns the min(k, N) best rows of each query; ties are ordered by row number, lowest first.

    Raises:
        ValueError: if types, shapes, dtypes or devices do not match, or k < 1.
    """
    check_tensor(queries, "queries")
    check_tensor(base, "base")
    k = as_count(k, "k")
    if queries.ndim != 2 or base.ndim != 2 or queries.shape[1] != base.shape[1]:
        raise ValueError(f"queries and base must be [*, D], found {list(queries.shape)} and {list(base.shape)}")
    if queries.dtype != torch.float32 or base.dtype != torch.float32 or queries.device != base.device:
        raise ValueError(
            "queries and base must be float32 on one device, "
            f"found {queries.dtype} on {queries.device} and {base.dtype} on {base.device}"
        )
    kept = min(k, base.shape[0])
    if kept == 0 or queries.shape[0] == 0:
        shape = (queries.shape[0], kept)
        return Neighbors(queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64))
    engine, rows = default_engine(queries.device), base.contiguous()
    # Ties: the row number serves as the age.
    return search_exactly(engine, queries.contiguous(), rows, [(0, rows.shape[0])], lambda rows: rows, kept)
