"""Cores, CPU quotas, and how idle threads wait."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from msf_faiss import threads
from msf_faiss.threads import available_cores, cpu_quota, limit_blas, set_waiting

CONTAINER_V2 = {"proc/self/cgroup": "0::/\n"}
POD_V2 = {"proc/self/cgroup": "0::/pods/pod7/c1\n", "sys/fs/cgroup/pods/pod7/c1/cpu.max": "max 100000\n"}
DOCKER_V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/system.slice\n"}


def v1(group: str, quota: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{group}"
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),  # not Linux
        (CONTAINER_V2, None),
        ({**CONTAINER_V2, "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({**CONTAINER_V2, "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({**CONTAINER_V2, "sys/fs/cgroup/cpu.max": "garbage\n"}, None),
        ({**POD_V2, "sys/fs/cgroup/pods/pod7/cpu.max": "400000 100000\n"}, 4),
        (
            {
                **POD_V2,
                "sys/fs/cgroup/pods/pod7/c1/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/pods/cpu.max": "200000 100000\n",
            },
            2,  # the smallest on the way up
        ),
        ({**DOCKER_V1, **v1("cpu,cpuacct", 50_000)}, 0.5),  # the path is the host's, the mount the container's
        ({**DOCKER_V1, **v1("cpu/docker/abc", 250_000)}, 2.5),
        ({**DOCKER_V1, **v1("cpu/docker/abc", -1)}, None),
    ],
)
def test_cpu_quota_of_control_groups(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (0.2, 1), (1.5, 2), (3.0, 3), (64.0, 8)])
def test_available_cores_by_affinity_and_quota(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert available_cores() == cores


@pytest.mark.parametrize(
    ("environment", "added"),
    [
        ({}, {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1", "OPENBLAS_THREAD_TIMEOUT": "14"}),
        ({"GOMP_SPINCOUNT": "5"}, {"OPENBLAS_THREAD_TIMEOUT": "14"}),
        ({"OMP_WAIT_POLICY": "ACTIVE", "OPENBLAS_THREAD_TIMEOUT": "26"}, {}),
    ],
)
def test_set_waiting_keeps_the_users_settings(
    environment: dict[str, str], added: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", environment.copy())
    set_waiting()
    assert os.environ == {**environment, **added}


def run(code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "OPENBLAS_"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True).stdout


def test_commands_set_waiting_before_torch_is_loaded() -> None:
    code = """
import sys
import msf_faiss.threads
msf_faiss.threads.set_waiting = lambda: print(sorted({"torch", "numpy"} & {*sys.modules}))
from msf_faiss_cli.main import main
sys.argv = ["msf-faiss", "--version"]
main()
"""
    assert run(code).startswith("[]\n")


def test_pools_follow_the_quota_unless_the_user_sets_them() -> None:
    code = """
import torch
import msf_faiss.threads
torch.set_num_threads(4)
msf_faiss.threads.cpu_quota = lambda: 1.0
from msf_faiss.search.faiss_setup import faiss
print(torch.get_num_threads(), faiss.omp_get_max_threads())
"""
    assert run(code) == "1 1\n"
    assert run(code, OMP_NUM_THREADS="3").startswith("4 ")


@pytest.mark.usefixtures("no_sizes")
@pytest.mark.parametrize(("multiplications", "most", "limit"), [(1e3, 8, 1), (5e8, 8, 5), (1e12, 8, 8), (1e12, 3, 3)])
def test_blas_threads_by_work(multiplications: float, most: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available_cores", lambda: 16)
    limits: list[tuple[int, str]] = []

    def record(count: int, api: str) -> threadpool_limits:
        limits.append((count, api))
        return threadpool_limits(count, api)

    monkeypatch.setattr("threadpoolctl.threadpool_limits", record)
    with limit_blas(multiplications, most):
        pass
    assert limits == [(limit, "blas")]


@pytest.fixture
def no_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the sizes of pools from the environment, where whoever runs the tests may set them."""
    for name in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.mark.usefixtures("no_sizes")
def test_blas_limit_ends_and_keeps_the_users_size(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("numpy")  # whose BLAS this is
    with threadpool_limits(2, "blas"):
        with limit_blas(1, 8):
            assert blas_threads() == {1}
        assert blas_threads() == {2}
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
        with limit_blas(1, 8):
            assert blas_threads() == {2}
