"""Recall, memory and the ceilings of the machine, for benchmarks."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msf_faiss.search.faiss_setup import faiss

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def recall(found: Tensor, exact: Tensor, own: Tensor, k: int) -> float:
    """Return recall@k, excluding each query's own entry.

    Args:
        found: slots of the neighbours found, [B, k + 1].
        exact: slots of the true neighbours, [B, k + 1], best first.
        own: each query's own slot, [B].
        k: number of neighbours.
    """
    hits = total = 0
    for row, truth, self_slot in zip(found.tolist(), exact.tolist(), own.tolist(), strict=True):
        others = [slot for slot in truth if slot != self_slot][:k]
        hits += len(set(others) & set(row))
        total += len(others)
    return hits / total


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe command, date, machine and versions."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "faiss": faiss.__version__,
    }


def wait(device: torch.device) -> None:
    """Synchronise with `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_in_use(device: torch.device) -> int | None:
    """Return the bytes of `device` memory that this process uses; None for CPUs on other systems than Linux.

    Returns freed memory to the system first, because allocators keep it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    if not _STATUS.exists():
        return None
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak_extra(work: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak memory of `work` in bytes, beyond the memory in use before; None if it cannot be measured.

    On the CPU, this is the kernel's high-water mark of resident memory, reset before (Linux). On CUDA, it is torch's
    peak; FAISS allocates its memory once, earlier.
    """
    before = memory_in_use(device)
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - allocated
    if before is None:
        return None
    _CLEAR.write_text("5")
    work()
    return max(0, _status("VmHWM") - before)


def peak_resident() -> int:
    """Return the peak resident memory of this process in bytes, since its start or `peak_extra` (Linux only)."""
    return _status("VmHWM")


def ceilings(
    device: torch.device, batch: int, dim: int, *, side: int = 2048, block: int = 1 << 27, repeats: int = 7
) -> dict[str, float]:
    """Measure the ceilings of this machine: FLOP/s by precision, and "read" in bytes/s.

    Times matrix products with the shape of a tiled search and large square ones, with torch, and on the CPU in float32
    with numpy's BLAS too. Takes the best of a few repeats, because other processes can only slow them down.
    """
    found: dict[str, float] = {}
    side = side if device.type == "cpu" else 4 * side
    for rows, inner, columns in ((4096, dim, batch), (side, side, side)):
        flops = 2.0 * rows * inner * columns
        left, right = (torch.randn(shape, device=device) for shape in ((rows, inner), (inner, columns)))
        products: dict[str, list[Callable[[], object]]] = {"float32": [_product(left, right)]}
        if device.type == "cpu":
            a, b = left.numpy(), right.numpy()
            products["float32"].append(lambda a=a, b=b: np.matmul(a, b))  # type: ignore[misc]
        # CPUs do not multiply in float16, and torch would take seconds.
        for dtype in (torch.bfloat16,) if device.type == "cpu" else (torch.bfloat16, torch.float16):
            products[str(dtype).removeprefix("torch.")] = [_product(left.to(dtype), right.to(dtype))]
        if inner % 8 == columns % 8 == 0:
            x, y = ((10 * each).to(torch.int8) for each in (left, right))
            products["int8"] = [lambda x=x, y=y: torch._int_mm(x, y)]  # type: ignore[misc]
        for precision, ways in products.items():
            best = max(flops / _fastest(way, device, repeats) for way in ways)
            found[precision] = max(best, found.get(precision, 0.0))
    numbers = torch.ones(block if device.type == "cpu" else 8 * block, device=device)
    found["read"] = numbers.numel() * 4 / _fastest(numbers.sum, device, repeats)
    return found


def _product(left: Tensor, right: Tensor) -> Callable[[], object]:
    return lambda: left @ right


def _fastest(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _status(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{_STATUS} has no {name}")
