"""Diagnostics: what determines whether msf-faiss runs on this machine, and how fast, and problems with remedies."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from msf_faiss.bank.capacity import total_memory
from msf_faiss.search.autotune import time_engines
from msf_faiss.search.faiss_setup import best_blas_family, blas_family, faiss, has_gpu
from msf_faiss.threads import WAITING, available_cores, cpu_quota

_FLAGS = {  # instruction sets that speed up a search -> flag in /proc/cpuinfo
    **{name: name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni")},
    "amx": "amx_tile",
}
_AS_FAST = {"SkylakeX": {"skylakex"}, "Haswell": {"haswell", "zen"}}  # OpenBLAS ignores case
_WITH_GPU_WHEEL = "Linux x86_64"  # the only platform that faiss-gpu is published for


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A CUDA device that torch sees."""

    name: str
    memory: int  # bytes
    capability: str  # as in 9.0
    faiss: bool  # whether FAISS can use it


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Software and hardware, as this process sees them."""

    versions: dict[str, str]  # of Python and packages
    system: str
    faiss_wheels: tuple[str, ...]  # installed packages that contain FAISS; there should be one
    faiss_cuda: bool  # whether FAISS was built with CUDA
    faiss_gpus: int  # devices that FAISS sees
    gpus: tuple[Gpu, ...]
    blas: str | None  # kernel family of FAISS's OpenBLAS; None: unknown
    blas_chosen_by: str  # "user", "msf-faiss" or "OpenBLAS"
    blas_best: str | None  # the family for this processor; None: unknown, the choice is OpenBLAS's
    cpu: str | None  # model; None: unknown
    cpu_flags: dict[str, bool] | None  # which instruction sets there are; None: unknown
    cores: int  # available to this process
    cpu_quota: float | None  # of its container, in cores; None: no limit
    torch_threads: int
    faiss_threads: int
    omp_num_threads: str | None  # the environment variable; None: not set
    waiting: dict[str, str]  # the environment variables that say how idle threads wait
    memory: int | None  # bytes, total; None: unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchTiming:
    """Time of one search of an example bank by each exact engine."""

    device: str
    dtype: str
    rows: int
    dim: int
    batch: int
    k: int
    engine_ms: dict[str, float]  # milliseconds by engine, fastest first; empty if the search failed
    engine: str | None  # the choice of `bank.engine: auto`
    failure: str | None  # the error, if the search failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What keeps msf-faiss from running, or from running fast, and what to do about it."""

    what: str
    remedy: str


def inspect_machine() -> Machine:
    """The software and hardware that this process uses."""
    model, flags = _processor()
    return Machine(
        versions={
            "msf-faiss": importlib.metadata.version("msf-faiss"),
            "python": platform.python_version(),
            "torch": torch.__version__,  # includes the CUDA version, unlike the metadata of the package
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
        cores=available_cores(),
        cpu_quota=cpu_quota(),
        torch_threads=torch.get_num_threads(),
        faiss_threads=faiss.omp_get_max_threads(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        waiting={name: os.environ[name] for name in WAITING if name in os.environ},
        memory=total_memory(torch.device("cpu")),
    )


def time_search(*, device: torch.device, dtype: torch.dtype, rows: int, dim: int, batch: int, k: int) -> SearchTiming:
    """Time a search of an example bank by each exact engine.

    Args:
        device: of the bank.
        dtype: of its entries: float32, float16 or bfloat16.
        rows: number of entries, at most 65,536; the time of a search is proportional to it.
        dim: dimensions of an embedding.
        batch: queries per search.
        k: neighbours per query.
    """
    engine_ms: dict[str, float] = {}
    failure = None
    try:
        engine_ms = time_engines(torch.empty(rows, dim, dtype=dtype, device=device), batch, k)
    except RuntimeError as error:  # of CUDA, FAISS or the allocator
        failure = str(error).strip().splitlines()[0]
    return SearchTiming(
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


def find_problems(machine: Machine, search: SearchTiming) -> Iterator[Problem]:
    """Yield the problems of a machine, worst first."""
    if search.failure is not None:
        yield Problem(
            what=f"searching {search.rows:,} {search.dtype} entries of {search.dim} dimensions on {search.device} "
            f"failed: {search.failure}",
            remedy="try another --dtype, or if memory ran out, smaller --rows and --batch; nvidia-smi shows whether "
            "other processes use the GPU",
        )
    if len(machine.faiss_wheels) > 1:
        wheel = "faiss-gpu" if machine.system == _WITH_GPU_WHEEL else "faiss-cpu"
        yield Problem(
            what=f"{' and '.join(machine.faiss_wheels)} are both installed and overwrite each other's files",
            remedy=f"pip uninstall {' '.join(machine.faiss_wheels)}; pip install {wheel}",
        )
    if machine.gpus and not machine.gpus[0].faiss:
        yield _unused_gpu(machine)
    if machine.faiss_gpus and not machine.gpus:
        yield Problem(
            what=f"FAISS sees a GPU, but torch {machine.versions['torch']} does not, so training runs on the CPU",
            remedy="install torch for the CUDA version that nvidia-smi shows: https://pytorch.org/get-started",
        )
    if machine.blas is not None and machine.blas_best and machine.blas.lower() not in _AS_FAST[machine.blas_best]:
        yield Problem(
            what=f"OPENBLAS_CORETYPE is {machine.blas!r}, but this processor supports {machine.blas_best}: FAISS may "
            "take twice as long on the CPU, or more",
            remedy="unset OPENBLAS_CORETYPE; msf-faiss then sets the best value",
        )
    if search.device == "cpu" and max(machine.torch_threads, machine.faiss_threads) > machine.cores:
        yield Problem(
            what=f"torch has {machine.torch_threads} threads and FAISS {machine.faiss_threads}, but this process may "
            f"use only {machine.cores} cores: a search may take several times as long",
            remedy=f"set OMP_NUM_THREADS={machine.cores}, or train.threads in the config",
        )
    if search.device == "cpu" and machine.omp_num_threads is not None and machine.faiss_threads < machine.cores:
        yield Problem(
            what=f"OMP_NUM_THREADS is {machine.omp_num_threads}, but this process may use {machine.cores} cores",
            remedy="unset OMP_NUM_THREADS, or set train.threads in the config, unless other processes need the cores",
        )


def _unused_gpu(machine: Machine) -> Problem:
    meanwhile = "until then, the bank uses the torch engine"
    if not machine.faiss_cuda and machine.system != _WITH_GPU_WHEEL:
        return Problem(
            what=f"FAISS cannot use the GPU: faiss-gpu is not published for {machine.system}",
            remedy="nothing to do: the bank uses the torch engine",
        )
    if not machine.faiss_cuda:
        wheels = " ".join(machine.faiss_wheels) or "faiss-cpu"
        return Problem(
            what=f"torch sees a GPU, but FAISS ({wheels}) was built without CUDA",
            remedy=f"pip uninstall {wheels}; pip install faiss-gpu; {meanwhile}",
        )
    return Problem(
        what="torch sees a GPU, but FAISS does not, although it was built with CUDA",
        remedy="update the NVIDIA driver (FAISS needs CUDA 12; nvidia-smi shows what the driver supports), or "
        f"reinstall FAISS: pip install --force-reinstall faiss-gpu; {meanwhile}",
    )


def _processor() -> tuple[str | None, dict[str, bool] | None]:
    """Model and instruction sets of the processor; None if /proc/cpuinfo does not have them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None, None
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "flags" not in facts:  # not an x86
        return facts.get("model name"), None
    flags = set(facts["flags"].split())
    return facts.get("model name"), {name: flag in flags for name, flag in _FLAGS.items()}


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():  # with an outdated driver there are devices, but no properties
        return ()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(
        Gpu(name=gpu.name, memory=gpu.total_memory, capability=f"{gpu.major}.{gpu.minor}", faiss=has_gpu())
        for gpu in found
    )
