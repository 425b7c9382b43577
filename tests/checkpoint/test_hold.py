"""Reading the checkpoints of a run that trains meanwhile, and deletes old ones."""

import copy
import shutil
from pathlib import Path

import pytest
from small_states import save

from msf_faiss.checkpoint import format as checkpoint_format
from msf_faiss.checkpoint import hold
from msf_faiss.checkpoint.format import GoneCheckpointError, find_checkpoint, find_newest_valid, list_checkpoints
from msf_faiss.checkpoint.save import prune_checkpoints, remove_incomplete
from msf_faiss.train.state import TrainState


def steps(run_dir: Path) -> list[int]:
    return [checkpoint_format.step_of(path) for path in list_checkpoints(run_dir)]


def prune(run_dir: Path) -> None:
    prune_checkpoints(run_dir, keep_last=1, keep=lambda step: False)


@pytest.mark.parametrize("find", [find_checkpoint, lambda run_dir: find_newest_valid(run_dir)[0]])
def test_checkpoint_is_kept_while_it_is_read(tmp_path: Path, state: TrainState, find: object) -> None:
    save(tmp_path, state, 7)
    read, again = find(tmp_path), find(tmp_path)  # type: ignore[operator]
    copied = copy.deepcopy(read)
    save(tmp_path, state, 8)
    save(tmp_path, state, 9)
    prune(tmp_path)
    assert steps(tmp_path) == [7, 9]
    assert read.tensors("model").keys() == state.tensors()["model"].keys()
    del read
    prune(tmp_path)
    assert steps(tmp_path) == [7, 9]
    del again
    prune(tmp_path)
    assert steps(tmp_path) == [9]
    assert copied.step == 7


def test_gone_is_not_damaged(saved: Path, state: TrainState) -> None:
    found = find_checkpoint(saved)
    shutil.rmtree(saved)
    for read in (
        lambda: found.tensors("model"),
        lambda: found.verify(["bank.safetensors"]),
        lambda: find_checkpoint(saved),
    ):
        with pytest.raises(GoneCheckpointError, match=r"no such checkpoint, or not any more: .*keep_last"):
            read()


@pytest.mark.parametrize("find", [find_checkpoint, lambda run_dir: find_newest_valid(run_dir)[0]])
def test_newer_checkpoint_is_found_if_one_vanishes(
    tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch, find: object
) -> None:
    """A run saves and deletes between listing and reading, three times in a row."""
    save(tmp_path, state, 7)
    step = 7

    def list_and_advance(run_dir: Path) -> list[Path]:
        nonlocal step
        found = list_checkpoints(run_dir)
        if step < 10:
            step += 1
            save(run_dir, state, step)
            prune(run_dir)
        return found

    monkeypatch.setattr(checkpoint_format, "list_checkpoints", list_and_advance)
    assert find(tmp_path).step == 10  # type: ignore[operator]


def test_kill_while_a_checkpoint_is_deleted(tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is not taken for a damaged checkpoint, and the next start deletes it."""
    for step in (7, 8):
        save(tmp_path, state, step)

    def die(path: Path, **_: object) -> None:
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hold.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path)
    assert steps(tmp_path) == [8]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    remove_incomplete(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_without_locks_everything_is_deleted(
    tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoLocks:
        LOCK_SH = LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(descriptor: int, kind: int) -> None:
            raise OSError(95, "Operation not supported")

    monkeypatch.setattr(hold, "fcntl", NoLocks)
    save(tmp_path, state, 7)
    read = find_checkpoint(tmp_path)
    save(tmp_path, state, 8)
    prune(tmp_path)
    assert steps(tmp_path) == [8]
    with pytest.raises(GoneCheckpointError):
        read.tensors("model")
