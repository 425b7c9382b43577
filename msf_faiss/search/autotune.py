"""Finds the fastest engine of exact search by timing: it depends on the processor, the dtype and the shapes."""

import statistics
import time

import torch
from torch import Tensor

from msf_faiss.search.exact import MARGIN, Engine
from msf_faiss.search.faiss_engines import FaissCpu, FaissCuda
from msf_faiss.search.faiss_setup import drop_gpu_resources, has_gpu
from msf_faiss.search.torch_engine import TorchEngine

_CPU_ROWS = 65_536  # from here on the time of every engine is proportional to the rows
_ROUNDS = 3
_STREAMS = 4


def engines(device: torch.device) -> dict[str, Engine]:
    """Return the engines that work on `device`, by the value of `bank.engine`."""
    if device.type == "cpu":
        return {"faiss": FaissCpu(), "torch": TorchEngine()}
    available: dict[str, Engine] = {"torch": TorchEngine()}
    return {"faiss": FaissCuda(), "streams": FaissCuda(_STREAMS), **available} if has_gpu() else available


def time_engines(entries: Tensor, batch: int, k: int) -> dict[str, float]:
    """Return the milliseconds of a search by each engine, fastest first; medians of a few interleaved rounds.

    Args:
        entries: an empty ring [N, D], used as scratch memory and zeroed afterwards. On the CPU the first 65,536 rows
            are searched, on CUDA all.
        batch: queries in a search.
        k: neighbours of each query.
    """
    rows = entries if entries.is_cuda else entries[:_CPU_ROWS]
    generator = torch.Generator(rows.device).manual_seed(0)
    for tile in torch.split(rows, 4096):
        drawn = torch.randn(tile.shape, generator=generator, device=rows.device)
        tile.copy_(torch.nn.functional.normalize(drawn, dim=1))
    queries = rows[torch.arange(batch, device=rows.device) % rows.shape[0]]  # [B, D]
    count = min(k + MARGIN, rows.shape[0])
    candidates = engines(rows.device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(_ROUNDS + 1):
        for name, engine in candidates.items():
            _wait(rows.device)
            start = time.perf_counter()
            engine.propose(queries, rows, count)
            _wait(rows.device)
            if round_number:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - start))
    rows.zero_()
    drop_gpu_resources()  # frees the scratch memory of the engines that are not used
    medians = {name: statistics.median(each) for name, each in times.items()}
    return dict(sorted(medians.items(), key=lambda pair: pair[1]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
