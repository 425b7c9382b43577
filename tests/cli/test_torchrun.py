"""Several ranks from the command line: started by torchrun, or one by one as a scheduler does."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_server import Command
from invoking import TINY, Cli
from survival import LONG, outcome, read_until

FEW = [*LONG, "--set", "train.max_steps=60", "--set", "bank.placement=sharded", "--set", "data.workers=0"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def torchrun(*arguments: object, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Two ranks under torchrun, which are killed on leaving the context."""
    address = [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        f"--max-restarts={restarts}",
        "--monitor-interval=0.2",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *address, "-m", "msf_faiss_cli"]
    process = subprocess.Popen(
        [*command, "pretrain", *map(str, arguments)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("ranks") / "run"
    with torchrun(*FEW, "--out", run_dir) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return run_dir, errors


def assert_same(run_dir: Path, reference: Path) -> None:
    (tensors, lines), (expected, expected_lines) = outcome(run_dir), outcome(reference)
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not (tensors[name] == expected[name]).all()] == []
    assert lines == expected_lines


def test_only_rank_0_prints(reference: tuple[Path, str], msf_faiss: Cli) -> None:
    run_dir, errors = reference
    assert errors.count("run      ") == 1
    assert errors.count("\nstep 60/") == 1
    assert "on each of 2 ranks" in errors
    assert "ShardedBank(0 of 40 entries, on 2 ranks" in errors
    assert "Warning" not in errors
    last = max((run_dir / "checkpoints").glob("step-*"))
    assert sorted(path.name for path in last.glob("bank*")) == [
        f"bank-0000{rank}-of-00002.safetensors" for rank in (0, 1)
    ]
    page = run_dir.parent / "neighbors.json"
    shown = msf_faiss("inspect-neighbors", run_dir, "--queries", "3", "--out", page)
    assert shown.returncode == 0, shown.stderr


def test_torchrun_restarts_a_killed_rank_and_no_bit_changes(reference: tuple[Path, str], tmp_path: Path) -> None:
    with torchrun(*FEW, "--out", tmp_path / "run", restarts=1) as process:
        read_until(process, "step 20/")
        os.kill(ranks_of(process)[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resumed  after step" in errors
    assert_same(tmp_path / "run", reference[0])


def test_torchrun_terminated_saves_a_checkpoint(reference: tuple[Path, str], tmp_path: Path) -> None:
    with torchrun(*FEW, "--out", tmp_path / "run") as process:
        read_until(process, "step 20/")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert errors.count("SIGTERM: stopping after this step with a checkpoint") == 1
    assert "interrupted after step" in errors
    with by_hand(*FEW, "--out", tmp_path / "run") as processes:
        ends = [process.communicate(timeout=120)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], ends
    assert_same(tmp_path / "run", reference[0])


@contextmanager
def by_hand(*arguments: object, size: int = 2) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks as `srun` starts them, each with its place among the others in its environment."""
    port, processes = free_port(), []
    for rank in range(size):
        names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
        processes.append(Command("pretrain", *arguments, stderr=subprocess.PIPE, env=environment))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def test_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    with by_hand(*LONG, "--out", tmp_path / "run") as processes:
        read_until(processes[0], "step 8/")
        processes[1].send_signal(signal.SIGUSR1)
        ends = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes] == [75, 75], ends
    assert "interrupted after step" in ends[0]
    assert "Traceback" not in ends[0] + ends[1]


def test_lost_rank_ends_the_others_with_a_message(tmp_path: Path) -> None:
    with by_hand(*LONG, "--out", tmp_path / "run") as processes:
        read_until(processes[0], "step 8/")
        processes[1].kill()
        errors = processes[0].communicate(timeout=60)[1]
        assert processes[0].returncode == 75, errors
    assert "error: rank 0 lost another rank, whose own message says why. Start the same command again" in errors
    assert "Traceback" not in errors


def test_user_error_is_printed_once(tmp_path: Path) -> None:
    for setting, message in [("train.batch_size=3", "too small for 2 ranks"), ("train.epochs=none", "train.epochs")]:
        with by_hand(*TINY, "--set", setting, "--out", tmp_path / "run") as processes:
            ends = [process.communicate(timeout=60)[1] for process in processes]
            assert [process.returncode for process in processes] == [2, 2], ends
        assert message in ends[0]
        assert ends[1] == ""


def test_torchrun_needs_a_run_directory(msf_faiss: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    done = msf_faiss("pretrain", *TINY)
    assert done.returncode == 2
    assert "give its directory with --out" in done.stderr


def test_launch_example_starts_ranks(tmp_path: Path) -> None:
    """On one host, with the directory of torchrun first in PATH, as in an activated environment."""
    script = Path(__file__).parents[2] / "docs" / "launch" / "torchrun.sh"
    names = {
        "PORT": str(free_port()),
        "RANKS_PER_HOST": "2",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        [script, "1", "127.0.0.1", "demo", tmp_path / "run", *TINY],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **names},
    )
    assert done.returncode == 0, done.stderr
    assert "on each of 2 ranks" in done.stderr
    assert "finished after step 6" in done.stderr
