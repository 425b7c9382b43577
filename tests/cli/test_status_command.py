"""Status of a run for another terminal and for Prometheus."""

import json
import re
import signal
import socket
import urllib.request
from pathlib import Path

from invoking import TINY, Cli
from survival import LONG, read_until, started


def test_status_of_a_finished_run(msf_faiss: Cli, tiny_run: Path) -> None:
    done = msf_faiss("status", tiny_run)
    assert done.returncode == 0, done.stderr
    assert "state       finished" in done.stdout
    assert "step        6 of 6 (epoch 2)" in done.stdout
    assert re.search(r"kNN         20-NN accuracy [0-9.]+%, untrained [0-9.]+%, best [0-9.]+% at step 6", done.stdout)
    assert f"checkpoint  {tiny_run / 'checkpoints' / 'step-00000006'}" in done.stdout
    found = json.loads(msf_faiss("status", tiny_run, "--json").stdout)
    assert (found["state"], found["alive"], found["well"], found["heartbeat"]["step"]) == ("finished", False, True, 6)


def test_status_without_a_run(msf_faiss: Cli, tmp_path: Path) -> None:
    done = msf_faiss("status", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "no run there" in done.stderr


def test_status_follows_a_run_until_it_is_killed(msf_faiss: Cli, tmp_path: Path) -> None:
    with started(*LONG, "--set", "train.epochs=100000", "--out", tmp_path / "run") as process:
        read_until(process, "step 40/")
        found = json.loads(msf_faiss("status", tmp_path / "run", "--json").stdout)
        assert (found["state"], found["alive"], found["well"]) == ("training", True, True)
        beat = found["heartbeat"]
        assert beat["pid"] == process.pid
        assert beat["step"] >= 4
        assert beat["images_per_second"] > 0
        assert beat["eta_seconds"] > 0
        assert beat["checkpoint_step"] >= 3
        assert beat["loss"] > 0
        process.kill()
        process.wait()
    done = msf_faiss("status", tmp_path / "run", "--watch", "--every", "0.1")
    assert done.returncode == 3
    assert "dead: the process ended without recording why; start the same command again to resume" in done.stdout


def test_status_of_a_failed_run_gives_the_reason(msf_faiss: Cli, tmp_path: Path) -> None:
    failed = msf_faiss("pretrain", *TINY, "--set", "optimizer.learning_rate=1e30", "--out", tmp_path / "run")
    assert failed.returncode == 2
    done = msf_faiss("status", tmp_path / "run")
    assert done.returncode == 3
    assert "failed: " in done.stdout
    assert "training has diverged" in done.stdout


def test_prometheus_metrics(msf_faiss: Cli, tmp_path: Path) -> None:
    arguments = [*LONG, "--set", "train.epochs=100000", "--metrics-port", "0"]
    with started(*arguments, "--out", tmp_path / "run") as process:
        assert process.stderr is not None
        address = next(line.split()[1] for line in process.stderr if line.startswith("metrics  "))
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", address)
        read_until(process, "step 40/")
        with urllib.request.urlopen(address) as answer:
            text = answer.read().decode()
        gauges = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
        assert float(gauges["msf_faiss_step"]) >= 36
        assert float(gauges["msf_faiss_training"]) == 1
        assert float(gauges["msf_faiss_checkpoint_step"]) >= 3
        assert float(gauges["msf_faiss_collapsing_since"]) == -1
        assert {"msf_faiss_loss", "msf_faiss_images_per_second", "msf_faiss_embedding_std"} <= gauges.keys()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 75


def test_metrics_port_in_use(msf_faiss: Cli, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = msf_faiss("pretrain", *TINY, "--metrics-port", str(port), "--out", tmp_path / "run")
    assert done.returncode == 2
    assert f"--metrics-port {port}: cannot listen at 127.0.0.1" in done.stderr
