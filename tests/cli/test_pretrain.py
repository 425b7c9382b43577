import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_server import Command
from invoking import TINY, Cli, Invoke


def test_a_run_writes_its_directory(tiny_run: Path, msf_faiss: Cli, tmp_path: Path) -> None:
    assert {path.name for path in tiny_run.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "status.json", ".lock")
    }
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()[1:]]
    assert lines[-1]["step"] == 6
    assert all({"step", "epoch", "loss"} <= line.keys() for line in lines)


def test_stdout_is_the_run_directory_and_stderr_is_plain_when_piped(msf_faiss: Cli, tmp_path: Path) -> None:
    done = msf_faiss("pretrain", *TINY, "--set", "train.max_steps=2", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run'}\n"
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    steps = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/2", "2/2"]
    names = [part.split()[0] for part in steps[-1].split(" · ")]
    assert names[:4] == ["step", "epoch", "loss", "purity"]
    assert names[5:] == ["ETA", "time:", "embedding", "bank", "push", "age", "hubness"]


def test_default_run_directory_is_named_by_config_and_time(msf_faiss: Cli, tmp_path: Path) -> None:
    done = msf_faiss("pretrain", *TINY, "--set", "train.max_steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / done.stdout.strip()
    assert run_dir.parent == tmp_path / "runs"
    assert run_dir.name.startswith("demo-")
    assert (run_dir / "checkpoints").is_dir()


def test_dry_run_prints_a_config_that_reproduces_itself(msf_faiss: Cli, tmp_path: Path) -> None:
    first = msf_faiss("pretrain", *TINY, "--dry-run", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (tmp_path / "printed.yaml").write_text(first.stdout)
    again = msf_faiss("pretrain", "printed.yaml", "--dry-run", cwd=tmp_path)
    assert again.stdout == first.stdout
    assert not (tmp_path / "runs").exists()


def test_all_config_errors_are_reported_at_once(msf_faiss: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "sead: 1\noptimizer:\n  learning_rate: fast\nbank:\n  capacity: -5\n  kind: flatt\ntrain:\n  epochs: 2.5\n"
    )
    done = msf_faiss("pretrain", "bad.yaml", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for place in (
        "bad.yaml:1: sead",
        "bad.yaml:3: optimizer.learning_rate",
        "bad.yaml:5: bank.capacity",
        "bad.yaml:6: bank.kind",
        "bad.yaml:8: train.epochs",
    ):
        assert place in done.stderr
    assert "did you mean seed" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["no-such-config"], "no-such-config"),
        (["nowhere/config.yaml"], "nowhere/config.yaml"),
        (["folder", "--set", "data.path=nowhere"], "nowhere"),
        (["demo", "--set", "data.kind=parquet", "--set", "data.path=nowhere.parquet"], "nowhere.parquet"),
        (["demo", "--set", "train.device=cuda"], "no CUDA device"),
        (["demo", "--set", "train.batch_size=5000"], "do not fill a batch of 5000"),
    ],
)
def test_user_errors_exit_with_2(msf_faiss: Cli, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    done = msf_faiss("pretrain", *arguments, "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_resuming_needs_the_same_config(msf_faiss: Cli, tiny_run: Path) -> None:
    done = msf_faiss("pretrain", *TINY, "--out", tiny_run, "--resume", "never")
    assert done.returncode == 2
    assert f"error: {tiny_run}: already contains a run. Omit --resume never to resume it" in done.stderr
    other = msf_faiss("pretrain", *TINY, "--set", "seed=3", "--out", tiny_run)
    assert other.returncode == 2
    assert "the config differs from the run's (seed: was 0, now 3). Resume with the run's config" in other.stderr
    # It resumes with the same settings, or with none.
    for arguments in ([*TINY], []):
        again = msf_faiss("pretrain", *arguments, "--out", tiny_run)
        assert again.returncode == 0, again.stderr
        assert "resumed  after step 6 of 6" in again.stderr


def test_resume_path_starts_a_run_from_another_run(msf_faiss: Cli, tiny_run: Path, tmp_path: Path) -> None:
    """The new run keeps the config but for allowed changes, and the same command resumes it."""
    longer = ["--set", "train.epochs=3", "--allow-config-change", "train.epochs"]
    command = ["pretrain", *longer, "--resume", tiny_run, "--out", tmp_path / "run"]
    done = msf_faiss(*command)
    assert done.returncode == 0, done.stderr
    assert "resumed  after step 6 of 9" in done.stderr
    assert "note     config changed: train.epochs: was 2, now 3" in done.stderr
    again = msf_faiss(*command)
    assert again.returncode == 0, again.stderr
    assert "resumed  after step 9 of 9" in again.stderr
    (tmp_path / "other").mkdir()
    shutil.copytree(tiny_run, tmp_path / "other" / "run")
    refused = msf_faiss("pretrain", "--resume", tmp_path / "run", "--out", tmp_path / "other" / "run")
    assert refused.returncode == 2
    assert "contains a run that resumes from step-00000006, not from" in refused.stderr
    unknown = msf_faiss("pretrain", "--allow-config-change", "train.epoch", "--out", tmp_path / "run")
    assert unknown.returncode == 2
    assert "--allow-config-change train.epoch: no such key; did you mean train.epochs?" in unknown.stderr
    shape = ["--set", "model.dim=3", "--allow-config-change", "model"]
    fixed = msf_faiss("pretrain", *shape, "--out", tmp_path / "run")
    assert fixed.returncode == 2
    assert "(model.dim: was 64, now 3), and these settings cannot change within a run" in fixed.stderr


def test_resuming_with_another_bank_is_noted(msf_faiss: Cli, tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    longer = ["--set", "train.epochs=3", "--allow-config-change", "train.epochs"]
    arguments = [*TINY, *longer, "--set", "bank.capacity=30", "--out", str(tmp_path / "run")]
    refused = msf_faiss("pretrain", *arguments)
    assert refused.returncode == 2
    assert "allow the change with --allow-config-change bank.capacity, or start" in refused.stderr
    done = msf_faiss("pretrain", *arguments, "--allow-config-change", "bank")
    assert done.returncode == 0, done.stderr
    assert "note     config changed: bank.capacity: was 40, now 30" in done.stderr
    assert "note     the bank kept the newest 30 entries" in done.stderr
    assert "capacity: 30" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("state", ["ahead", "broken", "missing"])
def test_out_alone_takes_the_config_of_the_newest_checkpoint(
    invoke: Invoke, tiny_run: Path, tmp_path: Path, state: str
) -> None:
    """Whatever config.yaml says: a release before this one changed it before anything was trained."""
    run_dir = shutil.copytree(tiny_run, tmp_path / "run")
    written = run_dir / "config.yaml"
    text = written.read_text()
    if state == "missing":
        written.unlink()
    else:
        written.write_text(text.replace("k: 5", "k: 7") if state == "ahead" else "bank: [")
    done = invoke("pretrain", "--out", run_dir, "--dry-run")
    assert (done.code, done.stdout) == (0, text), done.stderr
    assert ("is not the config of the newest checkpoint, which is used" in done.stderr) == (state != "missing")


def test_out_alone_takes_the_config_of_a_run_without_checkpoint(invoke: Invoke, tiny_run: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    done = invoke("pretrain", "--out", run_dir, "--dry-run")
    assert (done.code, done.stdout) == (0, (tiny_run / "config.yaml").read_text()), done.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where not even root can write")
def test_unwritable_run_directory(msf_faiss: Cli) -> None:
    done = msf_faiss("pretrain", *TINY, "--out", "/proc/run")
    assert done.returncode == 2
    assert "cannot write the run directory" in done.stderr


def start(*arguments: str) -> subprocess.Popen[str]:
    return Command("pretrain", *arguments, stderr=subprocess.PIPE)


def endless(run_dir: Path, setting: str) -> list[str]:
    """Arguments of a tiny run that never finishes."""
    return [*TINY, "--set", "train.epochs=100000", "--set", setting, "--out", str(run_dir)]


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"the process ended without {text!r}")


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_saves_a_checkpoint_that_resumes(msf_faiss: Cli, tmp_path: Path, workers: int) -> None:
    arguments = endless(tmp_path / "run", f"data.workers={workers}")
    process = start(*arguments)
    wait_for(process, "step 3/")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping after this step with a checkpoint" in errors
    assert "Traceback" not in errors
    assert "interrupted after step" in errors
    saved = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir())
    again = start(*arguments, "--resume", "auto")
    wait_for(again, f"resumed  after step {saved:,} ")
    wait_for(again, f"step {saved + 1:,}/")
    again.send_signal(signal.SIGINT)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 130, errors


def test_run_directory_is_locked(msf_faiss: Cli, tmp_path: Path) -> None:
    arguments = endless(tmp_path / "run", "checkpoint.every_epochs=1")
    first = start(*arguments)
    wait_for(first, "step 1/")
    for resume in ("never", "auto"):
        second = msf_faiss("pretrain", *arguments, "--resume", resume)
        assert second.returncode == 2
        assert "another process is training there" in second.stderr or "already contains a run" in second.stderr
    assert "another process is training there" in second.stderr
    first.kill()
    first.communicate()
    third = start(*arguments, "--resume", "auto")
    wait_for(third, "resumed  after step")
    third.kill()
    third.communicate()


def test_killed_run_leaves_only_complete_checkpoints(msf_faiss: Cli, tmp_path: Path) -> None:
    arguments = endless(tmp_path / "run", "checkpoint.every_epochs=1")
    process = start(*arguments)
    wait_for(process, "step 30/")
    time.sleep(0.05)
    process.kill()
    process.communicate()
    again = start(*arguments, "--resume", "auto")
    wait_for(again, "resumed  after step")
    wait_for(again, "step ")
    again.send_signal(signal.SIGINT)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 130, errors
    assert not list((tmp_path / "run" / "checkpoints").glob(".saving-*"))


@pytest.mark.shared_data
def test_cifar10_config_trains_on_real_images(msf_faiss: Cli, shared_data: Path, tmp_path: Path) -> None:
    settings = [
        "data.kind=parquet",
        f"data.path={shared_data / 'cifar10_test.parquet'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.workers=1",
        "model.backbone.kind=narrow",
        "train.max_steps=3",
        "train.log_every=1",
        "train.threads=1",
        "knn.images=200",
    ]
    done = msf_faiss(
        "pretrain", "cifar10", *(part for s in settings for part in ("--set", s)), "--out", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert "10,000 images (10 classes, used for monitoring only)" in done.stderr
    assert "20-NN accuracy" in done.stderr
    page = tmp_path / "page.html"
    small = ("--queries", "3", "--page-images", "50", "--sample", "50")
    shown = msf_faiss("inspect-neighbors", tmp_path / "run", *small, "--out", page)
    assert shown.returncode == 0, shown.stderr
    assert page.stat().st_size > 10_000
