"""The command line as its users meet it: another process, its exit code, its two streams."""

import os
import subprocess
from pathlib import Path

import command_server
import pytest
from invoking import TINY, Cli, Invoke, invoker


@pytest.fixture(scope="session")
def msf_faiss() -> Cli:
    def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return command_server.run(*arguments, cwd=cwd, env={**os.environ, "COLUMNS": "100"})

    return run


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Invoke:
    return invoker(monkeypatch, capfd)


@pytest.fixture(scope="session")
def tiny_run(msf_faiss: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny demo. Tests that change it work on a copy."""
    run_dir = tmp_path_factory.mktemp("tiny") / "run"
    done = msf_faiss("pretrain", "demo", *TINY, "--out", run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir
