"""Exact search by FAISS over the ring in place: no index object, no second copy of the embeddings.

Shapes: B queries, C candidates, K neighbours, N rows, D dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msf_faiss.bank.base import Neighbors
from msf_faiss.bank.canonical import canonical
from msf_faiss.bank.faiss_setup import faiss, gpu_resources, has_gpu
from msf_faiss.bank.ring import RingBank

_MARGIN = 8  # candidates beyond k, so that rounding in float32 cannot hide a neighbour
_WIDER = 8  # times as many candidates when the margin may have been too small,
_WIDEST = 1024  # up to so many: a collapsed encoder, whose entries all tie, must not make a step take minutes
_GPU_MAX_K = 2048  # FAISS's limit on the GPU
_GPU_ROWS_16_BIT = 256  # more query rows a call exceed FAISS's scratch memory, and it allocates on every call
_TILE = 32_768  # rows converted to float32 at a time where FAISS cannot read the ring's dtype


class FlatBank(RingBank):
    """Exact FIFO bank in float32, float16 or bfloat16.

    On the CPU every answer is checked: where rounding could have hidden a neighbour (duplicates, a collapsed encoder)
    the search is repeated with more candidates, up to k + 1,024. On CUDA that check would wait for the device and is
    left out. Of entries that tie at the k-th place to within float32 rounding and are more than these, or more than 8
    on CUDA, any may be returned.

    Raises:
        ValueError: if dtype is none of the three.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"a flat bank holds float32, float16 or bfloat16, found {dtype}")
        super().__init__(capacity, dim, dtype, device)

    def search(self, queries: Tensor, k: int) -> Neighbors:
        queries = self._queries(queries, k)
        return _search(queries, self._entries[: len(self)], self._pushed, self.capacity, k)


def knn(queries: Tensor, base: Tensor, k: int) -> Neighbors:
    """Exact inner-product neighbours of `queries` [B, D] in `base` [N, D], both float32 and on one device.

    Returns the min(k, N) best rows of each query; equal similarities are ordered by row, the lowest first.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or k < 1.
    """
    if queries.ndim != 2 or base.ndim != 2 or queries.shape[1] != base.shape[1]:
        raise ValueError(f"queries and base must be [*, D], found {list(queries.shape)} and {list(base.shape)}")
    if queries.dtype != torch.float32 or base.dtype != torch.float32 or queries.device != base.device:
        raise ValueError(
            "queries and base must be float32 on one device, "
            f"found {queries.dtype} on {queries.device} and {base.dtype} on {base.device}"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    # Rows count as pushed last to first, which makes the lowest the youngest.
    return _search(queries.contiguous(), base.contiguous(), 0, 0, k)


def _search(queries: Tensor, rows: Tensor, pushed: int, capacity: int, k: int) -> Neighbors:
    """Canonical top k; rows age like a ring's slots, or by their number if `capacity` is 0."""

    def ages(slots: Tensor) -> Tensor:
        return (pushed - 1 - slots) % capacity if capacity else slots

    def answer(queries: Tensor, count: int) -> tuple[Neighbors, Tensor]:
        """Neighbours from `count` candidates, and the proposed similarity of the last candidate: [B]."""
        proposed = _candidates(queries, rows, count)
        found = canonical(queries, rows, proposed.slots, ages(proposed.slots), kept)
        return found, proposed.similarities[:, -1]

    filled = rows.shape[0]
    kept = min(k, filled)
    if kept == 0 or queries.shape[0] == 0:
        return Neighbors(queries.new_empty(queries.shape[0], kept, dtype=torch.float32), _slots(queries, kept))
    count = min(kept + _MARGIN, filled)
    found, last = answer(queries, count)
    if queries.is_cuda:
        return found
    # A float32 dot product of unit vectors errs by less than 4 sqrt(D) 2^-24 (probabilistic bound of Higham and Mary,
    # 2019). What was not proposed can only matter where the last candidate comes that close to the k-th neighbour.
    slack = 4 * math.sqrt(rows.shape[1]) * 2.0**-24
    doubtful = torch.arange(queries.shape[0])
    widest = min(kept + _WIDEST, filled)
    while count < widest:
        kth = found.similarities[doubtful, -1]
        doubtful = doubtful[last + 2 * slack >= kth]
        if doubtful.numel() == 0:
            break
        count = min(count * _WIDER, widest)
        again, last = answer(queries[doubtful], count)
        found.similarities[doubtful], found.slots[doubtful] = again
    return found


def _candidates(queries: Tensor, rows: Tensor, count: int) -> Neighbors:
    """`count` <= N proposals for each query, best first up to rounding; rows [N, D] are read in place."""
    on_gpu = queries.is_cuda and has_gpu() and count <= _GPU_MAX_K
    if on_gpu:
        whole = queries.shape[0] if rows.dtype == torch.float32 else _GPU_ROWS_16_BIT
        return _join([_gpu_knn(part, rows, count) for part in torch.split(queries, whole)], dim=0)
    if queries.is_cuda:
        best = [_torch_knn(queries.float(), tile.float(), count) for tile in torch.split(rows, _TILE)]
    elif rows.dtype == torch.float32:
        return _cpu_knn(queries, rows, count)
    else:
        best = [_cpu_knn(queries.float(), tile.float(), count) for tile in torch.split(rows, _TILE)]
    every = _join([Neighbors(found.similarities, found.slots + i * _TILE) for i, found in enumerate(best)], dim=1)
    similarities, places = every.similarities.topk(count, dim=1)
    return Neighbors(similarities, every.slots.gather(1, places))


def _cpu_knn(queries: Tensor, rows: Tensor, count: int) -> Neighbors:
    similarities, slots = faiss.knn(
        queries.numpy(), rows.numpy(), min(count, rows.shape[0]), metric=faiss.METRIC_INNER_PRODUCT
    )
    # A query that is not a number finds nothing, which FAISS marks by -1; its similarities stay not-a-number below.
    return Neighbors(torch.from_numpy(similarities), torch.from_numpy(slots).clamp_(min=0))


def _gpu_knn(queries: Tensor, rows: Tensor, count: int) -> Neighbors:
    with torch.cuda.device(queries.device):  # FAISS takes the current device's stream, whatever the tensor's device
        similarities, slots = faiss.knn_gpu(
            gpu_resources(queries.device),
            queries,
            rows,
            count,
            metric=faiss.METRIC_INNER_PRODUCT,
            device=torch.cuda.current_device(),
        )
    return Neighbors(similarities, slots.clamp_(min=0))


def _torch_knn(queries: Tensor, rows: Tensor, count: int) -> Neighbors:
    return Neighbors(*(queries @ rows.T).topk(min(count, rows.shape[0]), dim=1))


def _join(parts: list[Neighbors], dim: int) -> Neighbors:
    if len(parts) == 1:
        return parts[0]
    return Neighbors(torch.cat([p.similarities for p in parts], dim), torch.cat([p.slots for p in parts], dim))


def _slots(queries: Tensor, k: int) -> Tensor:
    return torch.empty(queries.shape[0], k, dtype=torch.int64, device=queries.device)
