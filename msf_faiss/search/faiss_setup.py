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
from typing import Any, Literal, NamedTuple

import torch

from msf_faiss.errors import UserError


class BlasFamily(NamedTuple):
    """The OpenBLAS kernel family that FAISS was given."""

    name: str | None  # as OPENBLAS_CORETYPE spells it; None: OpenBLAS found one by itself, and does not say which
    chosen_by: Literal["user", "msf-faiss", "OpenBLAS"]


def best_blas_family() -> str | None:
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


def choose_blas_family() -> BlasFamily:
    """What the user set, or else the best that is known."""
    if "OPENBLAS_CORETYPE" in os.environ:
        return BlasFamily(os.environ["OPENBLAS_CORETYPE"], "user")
    best = best_blas_family()
    return BlasFamily(best, "msf-faiss" if best else "OpenBLAS")


def _import_faiss(blas: BlasFamily) -> Any:
    chosen = blas.chosen_by == "msf-faiss"
    if chosen:
        assert blas.name is not None
        os.environ["OPENBLAS_CORETYPE"] = blas.name
    try:
        import faiss
    except ImportError as error:
        wheel = "faiss-gpu" if (platform.system(), platform.machine()) == ("Linux", "x86_64") else "faiss-cpu"
        raise UserError(
            f"FAISS cannot be imported ({error}); install it anew: pip install --force-reinstall {wheel}"
        ) from error
    finally:
        if chosen:  # so that other libraries and child processes keep their own choice
            del os.environ["OPENBLAS_CORETYPE"]
    faiss.cvar.distance_compute_blas_threshold = 0
    if faiss.get_num_gpus() > 0:
        import faiss.contrib.torch_utils  # knn_gpu takes torch tensors, on torch's current stream
    return faiss


blas_family = choose_blas_family()
faiss = _import_faiss(blas_family)

_per_thread = threading.local()


def has_gpu() -> bool:
    """Whether FAISS can search on a GPU here (a GPU is present and this build of FAISS has CUDA)."""
    return faiss.get_num_gpus() > 0 and hasattr(faiss, "StandardGpuResources")


def gpu_resources(device: torch.device, stream: int = 0) -> Any:
    """FAISS's scratch memory for `device`: made once per thread and device, since it is costly and not thread-safe.

    Work on several streams at a time needs one each: `stream` numbers them.
    """
    assert has_gpu()
    made: dict[tuple[int, int], Any] = _per_thread.__dict__.setdefault("resources", {})
    index = device.index if device.index is not None else torch.cuda.current_device()
    if (index, stream) not in made:
        with torch.cuda.device(index):
            made[index, stream] = faiss.StandardGpuResources()
    return made[index, stream]


def drop_gpu_resources() -> None:
    """Free what `gpu_resources` made for this thread."""
    _per_thread.__dict__.pop("resources", None)


def set_threads(threads: int) -> None:
    """Give `threads` threads to torch and to FAISS, each of which has a pool; more than there are cores is slow."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
