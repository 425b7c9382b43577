"""The only place that imports FAISS, with what must happen before and after.

- torch comes first: the wheels bring an OpenMP runtime each, and this order is the one that works everywhere.
- FAISS's bundled OpenBLAS takes processors younger than itself for very old ones and is 2 to 4 times slower then;
  OPENBLAS_CORETYPE corrects it, but only before the library is loaded. A user's own setting is left alone.
- FAISS leaves BLAS for a scalar loop, ten times slower, when a batch of queries is small (under about 250).
- Without a GPU `StandardGpuResources()` succeeds and `knn_gpu` then aborts the process: ask `has_gpu` first.
"""

from __future__ import annotations

import os
import platform
import threading
from pathlib import Path
from typing import Any

import torch


def _openblas_core() -> str | None:
    """The OpenBLAS kernel family for this processor; None where OpenBLAS finds it by itself."""
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return None
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: no cheap way to know
        return None
    if "avx512f" in flags:
        return "SkylakeX"
    return "Haswell" if "avx2" in flags else None


def _import_faiss() -> Any:
    core = _openblas_core()
    chosen = core is not None and "OPENBLAS_CORETYPE" not in os.environ
    if chosen:
        assert core is not None
        os.environ["OPENBLAS_CORETYPE"] = core
    try:
        import faiss
    finally:
        if chosen:  # so that other libraries and child processes keep their own choice
            del os.environ["OPENBLAS_CORETYPE"]
    faiss.cvar.distance_compute_blas_threshold = 0
    if faiss.get_num_gpus() > 0:
        import faiss.contrib.torch_utils  # knn_gpu takes torch tensors, on torch's current stream
    return faiss


faiss = _import_faiss()

_per_thread = threading.local()


def has_gpu() -> bool:
    """Whether FAISS can search on a GPU here (a GPU is present and this build of FAISS has CUDA)."""
    return faiss.get_num_gpus() > 0 and hasattr(faiss, "StandardGpuResources")


def gpu_resources(device: torch.device) -> Any:
    """FAISS's scratch memory for `device`: made once per thread and device, since it is costly and not thread-safe."""
    assert has_gpu()
    made: dict[int, Any] = _per_thread.__dict__.setdefault("resources", {})
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in made:
        with torch.cuda.device(index):
            made[index] = faiss.StandardGpuResources()
    return made[index]


def set_threads(threads: int) -> None:
    """Give `threads` threads to torch and to FAISS, each of which has a pool; more than there are cores is slow."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
