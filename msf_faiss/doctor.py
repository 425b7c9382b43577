"""What decides whether msf-faiss runs on this machine, and how fast: versions, processor, GPUs, engines, problems."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from msf_faiss.bank.capacity import total_memory
from msf_faiss.search.autotune import time_engines
from msf_faiss.search.faiss_setup import best_blas_family, blas_family, faiss, has_gpu

_FLAGS = {  # instruction sets that speed a search up, and the flag that says so
    **{name: name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni")},
    "amx": "amx_tile",
}
_AS_FAST = {"SkylakeX": {"skylakex"}, "Haswell": {"haswell", "zen"}}  # OpenBLAS ignores case
_WITH_GPU_WHEEL = "Linux x86_64"  # the only system for which faiss-gpu is published


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A CUDA device that torch sees."""

    name: str
    memory: int  # bytes
    capability: str  # as in 9.0
    faiss: bool  # whether FAISS can search on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Software and hardware, as this process sees them."""

    versions: dict[str, str]  # by package, and of Python
    system: str
    faiss_wheels: tuple[str, ...]  # packages that installed FAISS; one, if all is well
    faiss_cuda: bool  # whether this build of FAISS has CUDA
    faiss_gpus: int  # devices that FAISS sees
    gpus: tuple[Gpu, ...]
    blas: str | None  # kernel family that FAISS was given; None: not known
    blas_chosen_by: str  # user, msf-faiss or OpenBLAS
    blas_best: str | None  # what msf-faiss chooses on this processor; None: leaves it to OpenBLAS
    cpu: str | None  # model; None: not known
    cpu_flags: dict[str, bool] | None  # instruction sets that matter here; None: not known
    cores: int  # that this process may use
    torch_threads: int
    faiss_threads: int
    omp_num_threads: str | None  # the environment variable; None: not set
    memory: int | None  # bytes in all; None: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How long the exact engines take for a search of an example bank."""

    device: str
    dtype: str
    rows: int
    dim: int
    batch: int
    k: int
    engine_ms: dict[str, float]  # milliseconds by engine, the fastest first; empty: they failed
    engine: str | None  # what `bank.engine: auto` takes
    failure: str | None  # why there are no timings


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that keeps msf-faiss from running, or running fast, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All that was found."""

    machine: Machine
    search: Search
    problems: tuple[Problem, ...]


def diagnose(*, device: torch.device, dtype: torch.dtype, rows: int, dim: int, batch: int, k: int) -> Diagnosis:
    """Examine this machine, and time the exact engines on it.

    Args:
        device: where the bank would be.
        dtype: of an entry: float32, float16 or bfloat16.
        rows: entries that are searched, at most 65,536: a search of more takes proportionally longer.
        dim: dimensions of an entry.
        batch: queries in a search.
        k: neighbours of each.
    """
    machine = examine()
    search = time_search(device=device, dtype=dtype, rows=rows, dim=dim, batch=batch, k=k)
    return Diagnosis(machine=machine, search=search, problems=find_problems(machine, search))


def examine() -> Machine:
    """What this process runs on and with."""
    model, flags = _processor()
    return Machine(
        versions={
            "msf-faiss": importlib.metadata.version("msf-faiss"),
            "python": platform.python_version(),
            "torch": torch.__version__,  # with its CUDA version, which the package's metadata lack
            "torchvision": importlib.metadata.version("torchvision"),
            "faiss": faiss.__version__,
            "numpy": importlib.metadata.version("numpy"),
        },
        system=f"{platform.system()} {platform.machine()}",
        faiss_wheels=tuple(sorted(set(importlib.metadata.packages_distributions().get("faiss", [])))),
        faiss_cuda=hasattr(faiss, "StandardGpuResources"),
        faiss_gpus=faiss.get_num_gpus(),
        gpus=_gpus(),
        blas=blas_family.name,
        blas_chosen_by=blas_family.chosen_by,
        blas_best=best_blas_family(),
        cpu=model,
        cpu_flags=flags,
        cores=_cores(),
        torch_threads=torch.get_num_threads(),
        faiss_threads=faiss.omp_get_max_threads(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        memory=total_memory(torch.device("cpu")),
    )


def time_search(*, device: torch.device, dtype: torch.dtype, rows: int, dim: int, batch: int, k: int) -> Search:
    """Time the exact engines; see `diagnose`."""
    engine_ms: dict[str, float] = {}
    failure = None
    try:
        engine_ms = time_engines(torch.empty(rows, dim, dtype=dtype, device=device), batch, k)
    except RuntimeError as error:  # whatever CUDA, FAISS or the allocator refuses is worth telling
        failure = str(error).strip().splitlines()[0]
    return Search(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        rows=rows,
        dim=dim,
        batch=batch,
        k=k,
        engine_ms=engine_ms,
        engine=next(iter(engine_ms), None),
        failure=failure,
    )


def find_problems(machine: Machine, search: Search) -> tuple[Problem, ...]:
    """What is wrong, the worst first."""
    found = [
        _failed_search(search),
        _several_wheels(machine),
        _unused_gpu(machine),
        _torch_without_gpu(machine),
        _slow_blas(machine),
        *([_too_many_threads(machine), _too_few_threads(machine)] if search.device == "cpu" else []),
    ]
    return tuple(problem for problem in found if problem is not None)


def _failed_search(search: Search) -> Problem | None:
    if search.failure is None:
        return None
    return Problem(
        what=f"a search of {search.rows:,} entries of {search.dim} {search.dtype} on {search.device} failed: "
        f"{search.failure}",
        remedy="try another --dtype, or fewer --rows and a smaller --batch if memory ran out; a GPU may be in use by "
        "other processes (nvidia-smi shows them)",
    )


def _several_wheels(machine: Machine) -> Problem | None:
    if len(machine.faiss_wheels) < 2:
        return None
    wheel = "faiss-gpu" if machine.system == _WITH_GPU_WHEEL else "faiss-cpu"
    return Problem(
        what=f"{' and '.join(machine.faiss_wheels)} are installed side by side, and overwrite each other's files",
        remedy=f"pip uninstall {' '.join(machine.faiss_wheels)}; pip install {wheel}",
    )


def _unused_gpu(machine: Machine) -> Problem | None:
    if not machine.gpus or machine.gpus[0].faiss:
        return None
    meanwhile = "until then the bank searches with the torch engine"
    if not machine.faiss_cuda and machine.system != _WITH_GPU_WHEEL:
        return Problem(
            what=f"FAISS cannot use the GPU: for {machine.system} there is no faiss-gpu",
            remedy="none is needed: the bank searches with the torch engine",
        )
    if not machine.faiss_cuda:
        wheels = " ".join(machine.faiss_wheels) or "faiss-cpu"
        return Problem(
            what=f"torch sees a GPU, and this build of FAISS ({wheels}) has no CUDA",
            remedy=f"pip uninstall {wheels}; pip install faiss-gpu; {meanwhile}",
        )
    return Problem(
        what="torch sees a GPU and FAISS does not, though this build of it has CUDA",
        remedy="update the NVIDIA driver (nvidia-smi shows the CUDA version that it supports, and FAISS needs 12), or "
        f"install FAISS again: pip install --force-reinstall faiss-gpu; {meanwhile}",
    )


def _torch_without_gpu(machine: Machine) -> Problem | None:
    if machine.gpus or not machine.faiss_gpus:
        return None
    return Problem(
        what=f"FAISS sees a GPU and torch {machine.versions['torch']} does not, so training runs on the CPU",
        remedy="install a build of torch for the CUDA version that nvidia-smi shows: https://pytorch.org/get-started",
    )


def _slow_blas(machine: Machine) -> Problem | None:
    if machine.blas is None or machine.blas_best is None or machine.blas.lower() in _AS_FAST[machine.blas_best]:
        return None
    return Problem(
        what=f"OPENBLAS_CORETYPE is {machine.blas!r}, and this processor can do {machine.blas_best}: on the CPU "
        "FAISS may take twice as long, or more",
        remedy="unset OPENBLAS_CORETYPE, and msf-faiss chooses",
    )


def _too_many_threads(machine: Machine) -> Problem | None:
    if max(machine.torch_threads, machine.faiss_threads) <= machine.cores:
        return None
    return Problem(
        what=f"torch has {machine.torch_threads} threads and FAISS {machine.faiss_threads}, and this process may use "
        f"only {machine.cores} cores: a search may take several times as long",
        remedy=f"set OMP_NUM_THREADS={machine.cores}, or train.threads in the config",
    )


def _too_few_threads(machine: Machine) -> Problem | None:
    if machine.omp_num_threads is None or machine.faiss_threads >= machine.cores:
        return None
    return Problem(
        what=f"OMP_NUM_THREADS is {machine.omp_num_threads}, and this process may use {machine.cores} cores",
        remedy="unset OMP_NUM_THREADS, or set train.threads in the config, unless the others are for other processes",
    )


def _processor() -> tuple[str | None, dict[str, bool] | None]:
    """Model and instruction sets of the processor; None where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None, None
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "flags" not in facts:  # not an x86
        return facts.get("model name"), None
    flags = set(facts["flags"].split())
    return facts.get("model name"), {name: flag in flags for name, flag in _FLAGS.items()}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():  # a driver that is too old has devices, and no properties
        return ()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(
        Gpu(name=gpu.name, memory=gpu.total_memory, capability=f"{gpu.major}.{gpu.minor}", faiss=has_gpu())
        for gpu in found
    )
