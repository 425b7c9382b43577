"""Cores that this process may use, and how threads of the numerical libraries wait for work.

torch, FAISS and scikit-learn have OpenMP pools; NumPy and SciPy have BLAS pools. By default an idle thread of a pool
spins for many milliseconds before it sleeps, so that the next call finds it awake. On a busy machine it takes the core
from a thread with work, and commands take several times as long. torch, FAISS and BLAS do not heed the CPU quota of a
container.

This module imports none of them, because `set_waiting` works only before they are loaded.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
WAITING = (*_OPENMP, "OPENBLAS_THREAD_TIMEOUT")
"""Environment variables that say how long idle threads spin before they sleep."""

_BLAS_SIZES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS")
_WORK_PER_THREAD = 1e8  # multiplications, a few milliseconds; for less, waking a thread may take longer than it saves


def set_waiting() -> None:
    """Let idle threads of libraries that are loaded later sleep soon; settings of the user are kept.

    About a millisecond of spinning bridges the gaps within a training step, for which a thread that sleeps is woken too
    late, and is less than a time slice of the scheduler, which a thread that spins for longer takes from one with work.
    """
    if not any(name in os.environ for name in _OPENMP):
        os.environ["GOMP_SPINCOUNT"] = "20000"  # of GNU's library; by default 300,000
        os.environ["KMP_BLOCKTIME"] = "1"  # of LLVM's and Intel's, in ms; by default 200
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "14")  # 2^14 cycles: microseconds; by default 2^26


def available_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and the CPU quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU quota of this process in cores, the smallest of its control groups; None: no quota.

    Reads Linux's control groups of version 1 and 2. `root` is the root of the file system.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [controllers, "cpu"] if controllers else [""]  # of version 1, or of version 2
        # A container may see its own group as the root, while the path is the host's.
        groups = [PurePosixPath(path), *PurePosixPath(path).parents]
        quotas += [
            quota
            for mount in mounts
            for group in groups
            if (quota := _quota_of(root / "sys/fs/cgroup" / mount / group.relative_to("/"))) is not None
        ]
    return min(quotas, default=None)


def _quota_of(group: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        quota, period = map(int, (group / "cpu.max").read_text(encoding="utf-8").split())
        return quota / period
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        files = (group / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
        quota, period = (int(file.read_text(encoding="utf-8")) for file in files)
        return quota / period if quota > 0 else None
    return None


@contextlib.contextmanager
def limit_blas(multiplications: float, most: int) -> Iterator[None]:
    """Limit the BLAS of NumPy and SciPy to as many threads as a product keeps busy; they must be loaded already.

    The calling thread spins until the others have done their share, so that on a busy machine small products take
    longer with each thread. A size that the user set in the environment is kept.

    Args:
        multiplications: of one typical product.
        most: number of threads.
    """
    if any(name in os.environ for name in _BLAS_SIZES):
        yield
        return
    from threadpoolctl import threadpool_limits

    threads = max(1, min(most, available_cores(), int(multiplications / _WORK_PER_THREAD)))
    with threadpool_limits(threads, "blas"):
        yield
