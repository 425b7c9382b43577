import shutil
from pathlib import Path

import pytest
import torch
from small_states import save

from msf_faiss.checkpoint import save as saving
from msf_faiss.checkpoint.format import find_checkpoint, find_newest_valid
from msf_faiss.checkpoint.save import prune_checkpoints, quarantine, remove_incomplete
from msf_faiss.errors import UserError
from msf_faiss.train.state import TrainState


def test_full_disk_leaves_the_earlier_checkpoint_intact(
    saved: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.safetensors.torch.save_file

    def fill_up(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.name.startswith("bank"):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(saving.safetensors.torch, "save_file", fill_up)
    with pytest.raises(UserError, match=f"cannot save step 8: the disk is full; free some space .*{saved}"):
        save(saved.parents[1], state, 8)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert find_checkpoint(saved.parents[1]).step == 7


def test_interrupted_save_leaves_nothing(saved: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "_sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(saved.parents[1], state, 8)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_save_never_replaces_a_checkpoint(saved: Path, state: TrainState) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(UserError, match="cannot save step 7"):
        save(saved.parents[1], state)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_quarantined_checkpoint_is_renamed_and_ignored(tmp_path: Path, state: TrainState) -> None:
    older, newer = save(tmp_path, state, 7), save(tmp_path, state, 9)
    assert quarantine(newer).name == "damaged-step-00000009"
    newer.mkdir()
    assert quarantine(newer).name == "damaged-step-00000009-2"
    assert find_newest_valid(tmp_path)[0].path == older


def test_incomplete_checkpoint_is_ignored_and_removed(saved: Path) -> None:
    incomplete = saved.with_name(".saving-step-00000009")
    shutil.copytree(saved, incomplete)
    assert find_checkpoint(saved.parents[1]).path == saved
    remove_incomplete(saved.parents[1])
    assert not incomplete.exists()
    assert saved.exists()


def test_prune_keeps_the_newest_and_the_chosen(tmp_path: Path, state: TrainState) -> None:
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, state, step)
    prune_checkpoints(tmp_path, keep_last=2, keep=lambda step: step % 4 == 0)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000008",
        "step-00000010",
    ]
