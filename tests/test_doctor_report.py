"""Diagnostics of this machine, and of machines described by a `Machine`."""

import dataclasses
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from msf_faiss import doctor as diagnosis
from msf_faiss.doctor import Gpu, Machine, Problem, SearchTiming, find_problems, inspect_machine, time_search
from msf_faiss.search import faiss_setup
from msf_faiss.search.autotune import engines
from msf_faiss.threads import available_cores

H100 = Gpu(name="NVIDIA H100", memory=80 << 30, capability="9.0", faiss=True)
HEALTHY = Machine(
    versions={"msf-faiss": "0.1.0", "python": "3.11.7", "torch": "2.14.1", "torchvision": "0.29", "faiss": "1.15.1"},
    system="Linux x86_64",
    faiss_wheels=("faiss-gpu",),
    faiss_cuda=True,
    faiss_gpus=0,
    gpus=(),
    blas="SkylakeX",
    blas_chosen_by="msf-faiss",
    blas_best="SkylakeX",
    cpu="AMD EPYC",
    cpu_flags={"avx2": True, "avx512f": True},
    cores=4,
    cpu_quota=None,
    torch_threads=2,  # torch counts physical cores
    faiss_threads=4,
    omp_num_threads=None,
    waiting={"GOMP_SPINCOUNT": "20000"},
    memory=16 << 30,
)
TIMED = SearchTiming(
    device="cpu",
    dtype="float32",
    rows=64,
    dim=8,
    batch=4,
    k=5,
    engine_ms={"faiss": 1.0, "torch": 2.0},
    engine="faiss",
    failure=None,
)
CPUINFO = "processor : 0\nmodel name : Some CPU: fast @ 3 GHz\nflags : fpu avx2 avx512f amx_tile\n\nprocessor : 1\n"


def problems(search: SearchTiming = TIMED, **changes: Any) -> tuple[Problem, ...]:
    return tuple(find_problems(dataclasses.replace(HEALTHY, **changes), search))


def fake_cpuinfo(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    """Replace the content of /proc/cpuinfo; None: no such file, as on macOS and Windows."""
    read = Path.read_text

    def read_text(path: Path, *arguments: Any, **options: Any) -> str:
        if path != Path("/proc/cpuinfo"):
            return read(path, *arguments, **options)
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)


def test_inspect_this_machine() -> None:
    machine = inspect_machine()
    assert machine.versions["torch"] == torch.__version__
    assert machine.faiss_wheels in {("faiss-gpu",), ("faiss-cpu",)}
    assert machine.cores >= 1
    assert machine.faiss_threads == 1  # the tests' setting


def test_time_search_on_the_cpu() -> None:
    search = time_search(device=torch.device("cpu"), dtype=torch.bfloat16, rows=300, dim=16, batch=7, k=5)
    assert (search.device, search.dtype, search.rows, search.dim) == ("cpu", "bfloat16", 300, 16)
    assert set(search.engine_ms) == set(engines(torch.device("cpu")))
    assert list(search.engine_ms.values()) == sorted(search.engine_ms.values())
    assert search.engine == next(iter(search.engine_ms))
    assert search.failure is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_inspect_and_time_a_gpu() -> None:
    device = torch.device("cuda", 0)
    search = time_search(device=device, dtype=torch.bfloat16, rows=4096, dim=64, batch=32, k=5)
    gpus = inspect_machine().gpus
    assert len(gpus) == torch.cuda.device_count()
    assert gpus[0].name == torch.cuda.get_device_name(0)
    assert set(search.engine_ms) == set(engines(device))


def test_outdated_driver_counts_as_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch then counts devices that it cannot use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert inspect_machine().gpus == ()


def test_processor_is_read_from_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpuinfo(monkeypatch, CPUINFO)
    machine = inspect_machine()
    assert machine.cpu == "Some CPU: fast @ 3 GHz"
    assert machine.cpu_flags == {
        "avx2": True,
        "avx512f": True,
        "avx512_bf16": False,
        "avx512_vnni": False,
        "amx": True,
    }


def test_processor_other_than_x86_has_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpuinfo(monkeypatch, "processor : 0\nFeatures : fp asimd sve\n")
    machine = inspect_machine()
    assert (machine.cpu, machine.cpu_flags) == (None, None)


def test_system_without_cpuinfo_is_inspected(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpuinfo(monkeypatch, None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sysconf", raising=False)
    machine = inspect_machine()
    assert (machine.cpu, machine.cpu_flags, machine.blas_best, machine.memory) == (None, None, None, None)
    assert machine.cores == available_cores()
    assert not [problem for problem in find_problems(machine, TIMED) if "OPENBLAS" in problem.what]


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "setting", "family"),
    [
        ("x86_64", CPUINFO, None, ("SkylakeX", "msf-faiss")),
        ("AMD64", "flags : fpu avx2", None, ("Haswell", "msf-faiss")),
        ("x86_64", "flags : fpu sse2", None, (None, "OpenBLAS")),
        ("x86_64", None, None, (None, "OpenBLAS")),
        ("aarch64", "Features : sve", None, (None, "OpenBLAS")),
        ("x86_64", CPUINFO, "Zen", ("Zen", "user")),
        ("arm64", None, "ARMV8", ("ARMV8", "user")),
    ],
)
def test_choose_blas_family(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    cpuinfo: str | None,
    setting: str | None,
    family: tuple[str | None, str],
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    fake_cpuinfo(monkeypatch, cpuinfo)
    if setting is None:
        monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    else:
        monkeypatch.setenv("OPENBLAS_CORETYPE", setting)
    assert faiss_setup.choose_blas_family() == family


def test_failed_search_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> dict[str, float]:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nC++ stack trace")

    monkeypatch.setattr(diagnosis, "time_engines", fail)
    search = time_search(device=torch.device("cpu"), dtype=torch.float32, rows=64, dim=8, batch=4, k=5)
    assert (search.engine_ms, search.engine) == ({}, None)
    (problem,) = problems(search)
    assert (
        "64 float32 entries of 8 dimensions on cpu failed: CUDA out of memory. Tried to allocate 2 GiB." in problem.what
    )
    assert "stack trace" not in problem.what


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gpus": (H100, H100), "faiss_gpus": 2},
        {"blas": None, "blas_chosen_by": "OpenBLAS", "blas_best": None},
        {"blas": "skylakex", "blas_chosen_by": "user"},
        {"blas": "Zen", "blas_chosen_by": "user", "blas_best": "Haswell"},
        {"omp_num_threads": "4"},
        {"system": "Darwin arm64", "faiss_wheels": ("faiss-cpu",), "faiss_cuda": False},
    ],
)
def test_healthy_machine_has_no_problems(changes: dict[str, Any]) -> None:
    assert problems(**changes) == ()


UNUSED = {"gpus": (dataclasses.replace(H100, faiss=False),)}


@pytest.mark.parametrize(
    ("changes", "what", "remedy"),
    [
        (
            {"faiss_wheels": ("faiss-cpu", "faiss-gpu")},
            "faiss-cpu and faiss-gpu are both installed",
            "pip uninstall faiss-cpu faiss-gpu; pip install faiss-gpu",
        ),
        (
            {"faiss_wheels": ("faiss-cpu",), "faiss_cuda": False, **UNUSED},
            "torch sees a GPU, but FAISS (faiss-cpu) was built without CUDA",
            "pip uninstall faiss-cpu; pip install faiss-gpu; until then",
        ),
        (
            {"faiss_wheels": ("faiss-cpu",), "faiss_cuda": False, "system": "Linux aarch64", **UNUSED},
            "faiss-gpu is not published for Linux aarch64",
            "the bank uses the torch engine",
        ),
        (UNUSED, "torch sees a GPU, but FAISS does not", "update the NVIDIA driver"),
        ({"faiss_gpus": 1}, "FAISS sees a GPU, but torch 2.14.1 does not", "install torch for the CUDA version"),
        ({"blas": "Haswell", "blas_chosen_by": "user"}, "'Haswell', but this processor supports SkylakeX", "unset"),
        ({"blas": "", "blas_chosen_by": "user"}, "OPENBLAS_CORETYPE is ''", "unset"),
        ({"blas": "Barcelona", "blas_best": "Haswell"}, "this processor supports Haswell", "unset"),
        ({"torch_threads": 8}, "torch has 8 threads and FAISS 4", "set OMP_NUM_THREADS=4"),
        ({"faiss_threads": 1, "omp_num_threads": "1"}, "OMP_NUM_THREADS is 1", "unset OMP_NUM_THREADS"),
    ],
)
def test_each_problem_has_a_remedy(changes: dict[str, Any], what: str, remedy: str) -> None:
    (problem,) = problems(**changes)
    assert what in problem.what
    assert remedy in problem.remedy


def test_threads_are_no_problem_on_a_gpu() -> None:
    on_gpu = dataclasses.replace(TIMED, device="cuda:0")
    assert problems(on_gpu, gpus=(H100,), faiss_gpus=1, faiss_threads=1, omp_num_threads="1") == ()
