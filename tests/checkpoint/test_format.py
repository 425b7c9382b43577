import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_states import CONFIG, CPU, save

from msf_faiss.checkpoint import format as checkpoint
from msf_faiss.checkpoint.format import find_checkpoint, find_newest_valid
from msf_faiss.checkpoint.load import load_model
from msf_faiss.errors import UserError
from msf_faiss.train.state import TrainState


def test_find_checkpoint_accepts_run_checkpoint_and_manifest(saved: Path) -> None:
    for place in (saved, saved.parents[1], saved / "manifest.json"):
        found = find_checkpoint(place)
        assert (found.path, found.step, found.epoch, found.dataset_size) == (saved, 7, 1.75, 90)
        assert found.config == CONFIG
        assert found.run_dir == saved.parents[1]


def test_checkpoint_outside_a_run_has_no_run_dir(saved: Path, tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(saved, copied)
    assert find_checkpoint(copied).run_dir is None


def test_find_checkpoint_refuses_places_without_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory or checkpoint"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a run directory"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has not saved a checkpoint yet"):
        find_checkpoint(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="a file, but a checkpoint of msf-faiss is a directory"):
        find_checkpoint(tmp_path / "model.pth")


def test_every_damaged_file_is_detected(saved: Path) -> None:
    """A byte changed, missing or added, or the file gone: an error that names the file, never a silent load."""
    found = find_checkpoint(saved)
    for path in sorted(saved.glob("*.safetensors")):
        whole = path.read_bytes()
        for place in (0, 9, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UserError, match=rf"damaged: {path.name}: its SHA-256 differs"):
                found.tensors(path.stem)
        for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"damaged: {path.name} has [\d,]+ bytes instead of [\d,]+"):
                find_checkpoint(saved)
        path.unlink()
        with pytest.raises(UserError, match=f"{path.name} is missing"):
            find_checkpoint(saved)
        path.write_bytes(whole)
    assert find_checkpoint(saved) == found


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not JSON"),
        ('{"format": "msf-faiss checkpoint"', "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "not that of an msf-faiss checkpoint"),
        ('{"format": "msf-faiss checkpoint", "version": 1}', "format version 1, but this msf-faiss reads version 4"),
        ('{"format": "msf-faiss checkpoint", "version": 4}', r"manifest.json: its SHA-256 differs"),
        ("[" * 100_000, "is not JSON"),
        ('{"format": "\xff', "is not JSON"),
    ],
)
def test_foreign_manifest_is_refused(saved: Path, text: str, complaint: str) -> None:
    (saved / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=complaint):
        find_checkpoint(saved)


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as a program would that knows its seal."""
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    manifest["sha256"] = checkpoint.seal_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("version", 2, "format version 2, but this msf-faiss reads version 4; use the release that wrote it"),
        ("version", 99, "format version 99, but this msf-faiss reads version 4"),
        ("format", "something else", "not that of an msf-faiss checkpoint"),
        ("files", [], "missing or malformed"),
        (
            "files",
            {"../../model.safetensors": {"bytes": 1, "sha256": ""}},
            r"because \.\./\.\./model.safetensors, bank",
        ),
        ("step", None, "missing or malformed"),
        ("config", {"colour": "blue"}, "its config is not one of this msf-faiss: colour"),
    ],
)
def test_manifest_with_invalid_value_is_refused(saved: Path, key: str, value: object, complaint: str) -> None:
    edit_manifest(saved, lambda manifest: manifest.update({key: value}))
    with pytest.raises(UserError, match=complaint):
        find_checkpoint(saved)


class Poison:
    """What a pickle can do when it is loaded."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_pickle_is_refused_and_not_executed(saved: Path, tmp_path: Path, writer: str) -> None:
    """As an extra file, and in the place of the tensors under a manifest that vouches for it."""
    for name in ("extra.pt", "model.safetensors"):
        with (saved / name).open("wb") as file:
            if writer == "torch":
                torch.save(Poison(tmp_path / "executed"), file)
            else:
                pickle.dump(Poison(tmp_path / "executed"), file)
        with pytest.raises(UserError, match=r"refused, because extra.pt does not belong in a checkpoint"):
            find_checkpoint(saved)
    (saved / "extra.pt").unlink()
    content = (saved / "model.safetensors").read_bytes()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(saved, lambda manifest: manifest["files"].update({"model.safetensors": facts}))
    with pytest.raises(UserError, match="refused, because it is a pickle, which can execute code"):
        load_model(find_checkpoint(saved), CPU)
    with pytest.raises(UserError, match="refused, because it is a pickle, which can execute code"):
        TrainState.create(CONFIG, CPU).restore(find_newest_valid(saved.parents[1])[0])
    assert not (tmp_path / "executed").exists()


def test_damaged_newest_checkpoint_is_reported_with_the_one_before(tmp_path: Path, state: TrainState) -> None:
    older, newer = save(tmp_path, state, 7), save(tmp_path, state, 9)
    (newer / "bank.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"damaged.*the checkpoint before it is {older}"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(older).step == 7


def test_find_newest_valid_skips_damaged_checkpoints(tmp_path: Path, state: TrainState) -> None:
    paths = [save(tmp_path, state, step) for step in (7, 9, 11, 13)]
    (paths[3] / "manifest.json").unlink()
    content = bytearray((paths[2] / "bank.safetensors").read_bytes())
    content[-1] ^= 1
    (paths[2] / "bank.safetensors").write_bytes(content)
    found, damaged = find_newest_valid(tmp_path)
    assert (found.path, found.verified) == (paths[1], True)
    assert list(damaged) == [paths[3], paths[2]]
    assert "manifest.json is missing" in damaged[paths[3]]
    assert "bank.safetensors: its SHA-256 differs" in damaged[paths[2]]


def test_find_newest_valid_changes_nothing_if_all_are_damaged(tmp_path: Path, state: TrainState) -> None:
    for step in (7, 9):
        (save(tmp_path, state, step) / "rng.safetensors").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged(.|\n)*step-00000009(.|\n)*step-00000007"):
        find_newest_valid(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_unreadable_checkpoint_is_not_treated_as_damaged(
    tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong permissions must not send the run back to an older checkpoint."""
    save(tmp_path, state, 7)
    save(tmp_path, state, 9)

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "sha256_of", refuse)
    with pytest.raises(UserError, match=r"step-00000009/.*: cannot be read: permission denied"):
        find_newest_valid(tmp_path)


@pytest.mark.parametrize(("version", "dim"), [(3, 1), (4, None)])
def test_default_dimension_of_version_3(saved: Path, version: int, dim: int | None) -> None:
    """It had no floor of 64: the weights of such a run still fit its config."""

    def edit(manifest: dict[str, Any]) -> None:
        manifest["version"] = version
        manifest["config"]["model"]["dim"] = None

    edit_manifest(saved, edit)
    assert find_checkpoint(saved).config.model.dim == dim
