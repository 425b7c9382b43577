"""Imports FAISS, here and nowhere else, with the settings it needs.

- torch is imported first: both wheels contain an OpenMP runtime, and this order works everywhere.
- FAISS's bundled OpenBLAS mistakes newer processors for very old ones, which makes it 2 to 4 times slower.
  OPENBLAS_CORETYPE corrects this, but only before the library is loaded. A value set by the user is kept.
- With fewer than about 250 queries FAISS uses a scalar loop instead of BLAS, ten times slower, unless told otherwise.
- torch and FAISS start a thread per core, whatever the CPU quota of a container.
=======
- A forked child has none of its parent's OpenMP threads, and would wait for them for ever: it computes with one thread.
=======
- Without a GPU `StandardGpuResources()` succeeds, and `knn_gpu` then aborts the process: call `has_gpu` first.
"""

import os
import platform
import threading
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from msf_faiss.errors import UserError
from msf_faiss.threads import available_cores


class _BlasFamily(NamedTuple):
    """The OpenBLAS kernel family that FAISS uses."""

    name: str | None  # value of OPENBLAS_CORETYPE; None: chosen by OpenBLAS, which does not report it
    chosen_by: Literal["user", "msf-faiss", "OpenBLAS"]


def best_blas_family() -> str | None:
    """Return the best OpenBLAS kernel family for this processor; None where OpenBLAS detects it or it is unknown."""
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return None
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return None
    if "avx512f" in flags:
        return "SkylakeX"
    return "Haswell" if "avx2" in flags else None


def choose_blas_family() -> _BlasFamily:
    """Return the kernel family that the user set, or else the best known."""
    if "OPENBLAS_CORETYPE" in os.environ:
        return _BlasFamily(os.environ["OPENBLAS_CORETYPE"], "user")
    best = best_blas_family()
    return _BlasFamily(best, "msf-faiss" if best else "OpenBLAS")


def _import_faiss(blas: _BlasFamily) -> Any:
    chosen = blas.chosen_by == "msf-faiss"
    if chosen:
        assert blas.name is not None
        os.environ["OPENBLAS_CORETYPE"] = blas.name
    try:
        import faiss
    except ImportError as error:
        wheel = "faiss-gpu" if (platform.system(), platform.machine()) == ("Linux", "x86_64") else "faiss-cpu"
        raise UserError(
            f"FAISS cannot be imported ({error}). Reinstall it: pip install --force-reinstall {wheel}"
        ) from error
    finally:
        if chosen:  # other libraries and child processes must not inherit it
            del os.environ["OPENBLAS_CORETYPE"]
    faiss.cvar.distance_compute_blas_threshold = 0
    if faiss.get_num_gpus() > 0:
        import faiss.contrib.torch_utils  # makes knn_gpu accept torch tensors, and use torch's current stream
    return faiss


blas_family = choose_blas_family()
faiss = _import_faiss(blas_family)

_per_thread = threading.local()


def has_gpu() -> bool:
    """Return whether there is a GPU and this build of FAISS supports CUDA."""
    return faiss.get_num_gpus() > 0 and hasattr(faiss, "StandardGpuResources")


def gpu_resources(device: torch.device, stream: int = 0) -> Any:
    """Return FAISS's scratch memory for `device`, allocated once per thread and device: large, and not thread-safe.

    Concurrent work on several streams needs one for each: `stream` is their number.
    """
    assert has_gpu()
    resources: dict[tuple[int, int], Any] = _per_thread.__dict__.setdefault("resources", {})
    index = device.index if device.index is not None else torch.cuda.current_device()
    if (index, stream) not in resources:
        with torch.cuda.device(index):
            resources[index, stream] = faiss.StandardGpuResources()
    return resources[index, stream]


def drop_gpu_resources() -> None:
    """Free the scratch memory that `gpu_resources` allocated for this thread."""
    _per_thread.__dict__.pop("resources", None)


_forked = False


def set_threads(threads: int) -> None:
    """Set the number of threads of both torch and FAISS; more than the number of cores is slow.

    A forked child keeps one thread: it would wait forever for the OpenMP threads that only its parent has.
    """
    threads = 1 if _forked else threads
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def _limit_threads_to_quota() -> None:
    cores = available_cores()
    if torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
    if faiss.omp_get_max_threads() > cores:
        faiss.omp_set_num_threads(cores)


if "OMP_NUM_THREADS" not in os.environ:
    _limit_threads_to_quota()


def _after_fork() -> None:
    global _forked
    _forked = True
    set_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
