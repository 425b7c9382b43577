"""Faults around a run: each ends it with a message and an exit code, and the same command resumes it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from invoking import TINY, Cli
from PIL import Image
from survival import outcome, read_until, started, workers_of

from msf_faiss.checkpoint.format import find_checkpoint

SAVED_OFTEN = [*TINY, "--set", "checkpoint.every_epochs=1", "--set", "knn.every_epochs=100000"]
ENDLESS = [*SAVED_OFTEN, "--set", "train.epochs=100000"]
"""Never finishes, and saves every third step."""


def mount(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)


@contextmanager
def disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    """A small file system, mounted at `folder`."""
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("needs Linux and mount")
    folder.mkdir(parents=True)
    mounted = mount("-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", folder)
    if mounted.returncode:
        pytest.skip(f"may not mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> None:
    """Change mount options. The kernel refuses read-only while a file is open for writing, so try until none is."""
    for _ in range(2000):
        done = mount("-o", f"remount,{options}", folder)
        if done.returncode == 0:
            return
        time.sleep(0.005)
    pytest.skip(f"may not remount a tmpfs: {done.stderr.strip()}")


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest last; asserts that all are valid and nothing else is there."""
    found = sorted((run_dir / "checkpoints").iterdir())
    assert [path.name for path in found if not path.name.startswith("step-")] == []
    for path in found:
        checkpoint = find_checkpoint(path)
        checkpoint.verify(checkpoint.files)
        assert all(tensor.isfinite().all() for tensor in checkpoint.tensors("model").values())
    return found


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


def assert_resumes(*arguments: object, run_dir: Path) -> None:
    """The same command resumes the run from its newest checkpoint, and takes a step."""
    saved = step_of(checkpoints(run_dir)[-1])
    with started(*arguments) as process:
        read_until(process, f"resumed  after step {saved:,} ")
        read_until(process, f"step {saved + 1:,}/")


@pytest.mark.parametrize("free", [0, 64])
def test_disk_fills_up(tmp_path: Path, tiny_run: Path, free: int) -> None:
    """To the last byte, or with room (KiB) for the metrics but not for a checkpoint."""
    needed = sum(path.stat().st_size for path in checkpoints(tiny_run)[-1].iterdir()) // 1024
    assert needed > 2 * free
    with disk(tmp_path / "disk", 20 * needed + 4096) as folder:
        run_dir = folder / "run"
        arguments = [*ENDLESS, "--out", run_dir]
        with started(*arguments) as process:
            read_until(process, "step 8/")
            with (folder / "ballast").open("wb", buffering=0) as ballast:
                with contextlib.suppress(OSError):
                    while True:
                        ballast.write(bytes(4096))
                ballast.truncate(ballast.tell() - 1024 * free)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert "Traceback" not in errors
        last = checkpoints(run_dir)[-1]
        if free:
            assert f"cannot save step {step_of(last) + 3}: the disk is full; free some space" in errors
            assert f"run the same command again (the last good checkpoint is {last})" in errors
        else:  # depends on which file is written first
            assert "No space left on device" in errors or "the disk is full" in errors
        remount(folder, f"size={40 * needed + 8192}k")
        assert_resumes(*arguments, run_dir=run_dir)


def test_disk_too_small_for_a_second_checkpoint(tmp_path: Path, tiny_run: Path, msf_faiss: Cli) -> None:
    """Given more room, the same command completes the run with the same results."""
    needed = sum(path.stat().st_size for path in checkpoints(tiny_run)[-1].iterdir()) // 1024
    arguments = [*SAVED_OFTEN, "--set", "train.epochs=4"]
    reference = msf_faiss("pretrain", *arguments, "--out", tmp_path / "reference")
    assert reference.returncode == 0, reference.stderr
    with disk(tmp_path / "disk", needed * 3 // 2 + 64) as folder:
        run_dir = folder / "run"
        ended = msf_faiss("pretrain", *arguments, "--out", run_dir)
        assert ended.returncode == 2, ended.stderr
        assert "Traceback" not in ended.stderr
        (only,) = checkpoints(run_dir)
        assert (
            f"error: {run_dir / 'checkpoints'}: cannot save step 6: the disk is full; free some space and run the same "
            f"command again (the last good checkpoint is {only})"
        ) in ended.stderr
        remount(folder, f"size={8 * needed + 1024}k")
        again = msf_faiss("pretrain", *arguments, "--out", run_dir)
        assert again.returncode == 0, again.stderr
        assert f"resumed  after step {step_of(only)} of 12" in again.stderr
        (tensors, lines), (expected, expected_lines) = outcome(run_dir), outcome(tmp_path / "reference")
        assert tensors.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(tensors[name], expected[name])] in ([], ["rng.cpu"])
        assert lines == expected_lines


def test_checkpoints_become_read_only(tmp_path: Path) -> None:
    """Only the folder of the checkpoints: the kernel refuses for a file system with a file open for writing."""
    run_dir = tmp_path / "run"
    with disk(run_dir / "checkpoints", 64 * 1024) as folder:
        arguments = [*ENDLESS, "--out", run_dir]
        with started(*arguments) as process:
            read_until(process, "step 8/")
            remount(folder, "ro")
            before = contents(folder)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert "Traceback" not in errors
        assert contents(folder) == before
        last = checkpoints(run_dir)[-1]
        assert "Read-only file system; make it writable and run the same command again" in errors
        assert f"(the last good checkpoint is {last})" in errors
        remount(folder, "rw")
        assert_resumes(*arguments, run_dir=run_dir)


def write_images(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(40):
        Image.new("RGB", (20, 20), (6 * number, 99, 255 - 6 * number)).save(folder / f"{number:02d}.png")


def test_images_vanish(tmp_path: Path) -> None:
    images, run_dir = tmp_path / "images", tmp_path / "run"
    write_images(images)
    settings = [
        *(f"data.path={images}", "data.workers=1", "views.size=16", "train.batch_size=16", "train.threads=1"),
        *("model.backbone.kind=narrow", "model.backbone.width=4", "bank.capacity=40", "train.epochs=100000"),
        *("train.log_every=1", "checkpoint.every_epochs=100000", "optimizer.warmup_epochs=0", "data.cache=none"),
    ]
    arguments = ["folder", *(part for setting in settings for part in ("--set", setting)), "--out", run_dir]
    with started(*arguments) as process:
        read_until(process, "step 8/")
        for path in images.iterdir():
            path.unlink()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert f"error: {images}/" in errors
    assert ".png" in errors.partition("error: ")[2]
    assert "No such file" in errors
    write_images(images)
    assert_resumes(*arguments, run_dir=run_dir)


def test_branch_from_a_run_that_is_training(tmp_path: Path) -> None:
    """Whose checkpoints are deleted while they are being read: one is saved every few milliseconds."""
    with started(*ENDLESS, "--out", tmp_path / "run") as run:
        read_until(run, "saved checkpoint")
        for number in range(5):
            out = tmp_path / f"branch-{number}"
            with started(*ENDLESS, "--resume", tmp_path / "run", "--out", out) as branch:
                read_until(branch, "step ")
        assert run.poll() is None


def test_data_worker_is_killed(tmp_path: Path) -> None:
    """As the kernel does when memory runs out."""
    arguments = [*ENDLESS, "--set", "data.workers=1", "--out", tmp_path / "run"]
    with started(*arguments) as process:
        read_until(process, "step 8/")
        for worker in workers_of(process.pid):
            os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert "error: a worker process died" in errors
    assert_resumes(*arguments, run_dir=tmp_path / "run")


def test_divergence_leaves_earlier_checkpoints_intact(tiny_run: Path, tmp_path: Path, msf_faiss: Cli) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run, run_dir)
    before = contents(run_dir / "checkpoints")
    changes = ["--set", "train.epochs=9", "--set", "optimizer.learning_rate=1e30", "--set", "checkpoint.every_epochs=1"]
    allowed = ["train.epochs", "optimizer.learning_rate", "checkpoint.every_epochs"]
    done = msf_faiss(
        *("pretrain", *TINY, *changes, "--out", run_dir),
        *(part for key in allowed for part in ("--allow-config-change", key)),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "training has diverged. Lower optimizer.learning_rate" in done.stderr
    assert contents(run_dir / "checkpoints") == before
    assert step_of(checkpoints(run_dir)[-1]) == 6


BUG = """
import itertools
import msf_faiss.train.step
from msf_faiss_cli.main import main

count, loss = itertools.count(1), msf_faiss.train.step.mean_shift_loss
msf_faiss.train.step.mean_shift_loss = lambda *views: loss(*views) / (1 // (next(count) != 5))
if __name__ == "__main__":
    main()
"""
"""The command line with a bug in its fifth step."""


def test_bug_prints_a_traceback_and_damages_nothing(tmp_path: Path, msf_faiss: Cli) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "bug.py").write_text(BUG)
    arguments = ["pretrain", *SAVED_OFTEN, "--out", str(run_dir)]
    with subprocess.Popen(
        [sys.executable, tmp_path / "bug.py", *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "Traceback (most recent call last)" in errors
    assert errors.rstrip().splitlines()[-1].startswith("ZeroDivisionError: ")
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000003"]
    again = msf_faiss(*arguments)
    assert again.returncode == 0, again.stderr
    assert "resumed  after step 3 of 6" in again.stderr


class Payload:
    """Executes code when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.victim,)


def test_pickle_in_the_newest_checkpoint_is_not_executed(tiny_run: Path, tmp_path: Path, msf_faiss: Cli) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run, run_dir)
    newest = checkpoints(run_dir)[-1]
    torch.save(Payload(tmp_path / "executed"), newest / "extra.pt")
    before = contents(run_dir)
    done = msf_faiss("pretrain", *TINY, "--out", run_dir)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"error: {newest}: refused, because extra.pt does not belong in a checkpoint" in done.stderr
    assert not (tmp_path / "executed").exists()
    assert contents(run_dir) == before
