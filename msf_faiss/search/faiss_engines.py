"""Engines of exact search with FAISS, over the ring in place, on the CPU and on CUDA.

Shapes: B queries, C candidates, n rows, D dimensions.
"""

import torch
from torch import Tensor

from msf_faiss.search.exact import Engine, Proposal
from msf_faiss.search.faiss_setup import faiss, gpu_resources, has_gpu
from msf_faiss.search.torch_engine import TorchEngine

_TILE = 32_768
_GPU_MAX_K = 2048  # limit of FAISS on the GPU
_GPU_ROWS_16_BIT = 256  # with more query rows per call FAISS exceeds its scratch memory, and allocates on every call


def default_engine(device: torch.device) -> Engine:
    """Return the engine that works on every machine with `device`; `time_engines` finds the fastest."""
    if device.type == "cpu":
        return FaissCpu()
    return FaissCuda() if has_gpu() else TorchEngine()


class FaissCuda(Engine):
    """FAISS's brute-force kernel over a ring in GPU memory, on torch's current stream of the ring's device.

    It copies nothing, allocates nothing after the first call, and does not synchronize with the host.

    Args:
        streams: number of row ranges searched at the same time, each on its own stream. FAISS selects with one block
            of threads per query, which leaves most of a GPU idle at a batch of 256.
        least_rows: rows of a range at least.
    """

    def __init__(self, streams: int = 1, *, least_rows: int = _TILE) -> None:
        self._streams, self._least_rows = streams, least_rows
        self.name = "faiss" if streams == 1 else "streams"

    def propose(self, queries: Tensor, rows: Tensor, count: int) -> Proposal:
        if count > _GPU_MAX_K:
            return TorchEngine().propose(queries, rows, count)
        whole = queries.shape[0] if rows.dtype == torch.float32 else _GPU_ROWS_16_BIT
        parts = [self._knn(part, rows, count) for part in torch.split(queries, whole)]
        similarities, slots = (torch.cat(each) for each in zip(*parts, strict=True))
        return _proposal(similarities, slots, rows)

    def _knn(self, queries: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        slices = min(self._streams, rows.shape[0] // max(count, self._least_rows))
        if slices < 2:
            return _gpu_knn(queries, rows, count, stream=0)
        size = -(-rows.shape[0] // slices)
        here = torch.cuda.current_stream(queries.device)
        parts = []
        for number, start in enumerate(range(0, rows.shape[0], size)):
            stream = _side_stream(queries.device, number)
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                similarities, slots = _gpu_knn(queries, rows[start : start + size], count, stream=number + 1)
            here.wait_stream(stream)
            for tensor in (similarities, slots):
                tensor.record_stream(here)
            parts.append((similarities, slots + start))
        similarities, places = torch.cat([part[0] for part in parts], dim=1).topk(count, dim=1)
        return similarities, torch.cat([part[1] for part in parts], dim=1).gather(1, places)


class FaissCpu(Engine):
    """FAISS's blocked matrix product with heaps.

    Args:
        tile: rows of a 16-bit ring converted to float32 at a time, since FAISS reads float32 only.
    """

    name = "faiss"

    def __init__(self, *, tile: int = _TILE) -> None:
        self._tile = tile

    def propose(self, queries: Tensor, rows: Tensor, count: int) -> Proposal:
        if rows.dtype == torch.float32:
            similarities, slots = _knn(queries, rows, count)
        else:
            tiles = [_knn(queries.float(), tile.float(), count) for tile in torch.split(rows, self._tile)]
            every = torch.cat([tile[1] + i * self._tile for i, tile in enumerate(tiles)], dim=1)
            similarities, places = torch.cat([tile[0] for tile in tiles], dim=1).topk(count, dim=1)
            slots = every.gather(1, places)
        return _proposal(similarities, slots, rows)


def _proposal(similarities: Tensor, slots: Tensor, rows: Tensor) -> Proposal:
    """Propose `slots` [B, C], best first."""
    everything = slots.shape[1] == rows.shape[0]
    return Proposal(slots, torch.full_like(similarities[:, 0], -torch.inf) if everything else similarities[:, -1])


def _knn(queries: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    similarities, slots = faiss.knn(
        queries.numpy(), rows.numpy(), min(count, rows.shape[0]), metric=faiss.METRIC_INNER_PRODUCT
    )
    # FAISS returns -1 for a query with NaNs, whose similarities are NaN after rescoring.
    return torch.from_numpy(similarities), torch.from_numpy(slots).clamp_(min=0)


def _gpu_knn(queries: Tensor, rows: Tensor, count: int, *, stream: int) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(queries.device):  # FAISS uses the stream of the current device, not of the tensor's
        similarities, slots = faiss.knn_gpu(
            gpu_resources(queries.device, stream),
            queries,
            rows,
            min(count, rows.shape[0]),
            metric=faiss.METRIC_INNER_PRODUCT,
            device=torch.cuda.current_device(),
        )
    return similarities, slots.clamp_(min=0)


_side_streams: dict[tuple[int | None, int], torch.cuda.Stream] = {}


def _side_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    key = (device.index, number)
    if key not in _side_streams:
        _side_streams[key] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _side_streams[key]
