import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from msf_faiss.checkpoint import format as checkpoint
from msf_faiss.checkpoint.format import (
    find_checkpoint,
    find_newest_valid,
    prune_checkpoints,
    quarantine,
    remove_incomplete,
    save_checkpoint,
)
from msf_faiss.checkpoint.load import load_bank, load_model
from msf_faiss.config import Config, FlatBankConfig, IvfBankConfig, ModelConfig, NarrowBackbone
from msf_faiss.errors import UserError
from msf_faiss.train.state import TrainState

CONFIG = Config(
    seed=4,
    model=ModelConfig(backbone=NarrowBackbone(width=4, depths=(1,), strides=(2,))),
    bank=FlatBankConfig(capacity=20, dtype="bfloat16"),
)
CPU = torch.device("cpu")


def trained_state() -> TrainState:
    state = TrainState.create(CONFIG, CPU)
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    state.model(images).square().sum().backward()
    state.optimizer.step()
    for _ in range(5):
        state.bank.push(state.model.embed_target(images), torch.arange(6))
    state.step = 7
    return state


def save(run_dir: Path, state: TrainState, step: int = 7) -> Path:
    return save_checkpoint(run_dir, step=step, epoch=step / 4, config=CONFIG, dataset_size=90, tensors=state.tensors())


@pytest.fixture(scope="module")
def state() -> TrainState:
    return trained_state()


@pytest.fixture
def saved(tmp_path: Path, state: TrainState) -> Path:
    return save(tmp_path / "run", state)


def test_what_is_saved_is_loaded_bit_for_bit(saved: Path, state: TrainState) -> None:
    for place in (saved, saved.parents[1], saved / "manifest.json"):
        found = find_checkpoint(place)
        assert (found.path, found.step, found.epoch, found.dataset_size) == (saved, 7, 1.75, 90)
        assert found.config == CONFIG
        assert found.run_dir == saved.parents[1]
    restored = TrainState.create(CONFIG, CPU)
    restored.restore(found)
    assert restored.step == 7
    for name, tensors in state.tensors().items():
        again = restored.tensors()[name]
        assert tensors.keys() == again.keys()
        assert len(tensors) > 0
        for key, tensor in tensors.items():
            assert torch.equal(tensor, again[key]), (name, key)
    model, bank = load_model(found, CPU), load_bank(found, CPU)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.model.state_dict().items())
    assert (len(bank), bank.pushed, bank.dtype) == (20, 30, torch.bfloat16)


def test_a_checkpoint_may_be_copied_out_of_its_run(saved: Path, tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(saved, copied)
    assert find_checkpoint(copied).run_dir is None


def test_every_file_is_watched(saved: Path) -> None:
    """One byte changed, cut off or added, in any file: an error that names the checkpoint, never a silent load."""
    found = find_checkpoint(saved)
    for path in sorted(saved.glob("*.safetensors")):
        whole = path.read_bytes()
        for place in (0, 9, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UserError, match=rf"damaged: {path.name} is not what was saved"):
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
        ("", "cannot be read"),
        ('{"format": "msf-faiss checkpoint"', "cannot be read"),
        ("[]", "holds no object"),
        ("{}", "not that of an msf-faiss checkpoint"),
        ('{"format": "msf-faiss checkpoint", "version": 1}', "format version 1, this msf-faiss reads 2"),
        ('{"format": "msf-faiss checkpoint", "version": 2}', r"manifest.json is not what was saved \(its SHA-256"),
        ("[" * 100_000, "cannot be read"),
        ('{"format": "\xff', "cannot be read"),
    ],
)
def test_a_manifest_that_is_not_ours(saved: Path, text: str, complaint: str) -> None:
    (saved / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=complaint):
        find_checkpoint(saved)


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as another program would that knows how it is sealed."""
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    manifest["sha256"] = checkpoint._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_config_of_another_release_is_named(saved: Path) -> None:
    edit_manifest(saved, lambda manifest: manifest["config"]["bank"].update(colour="blue"))
    with pytest.raises(UserError, match=r"its config does not fit this msf-faiss: bank.colour"):
        find_checkpoint(saved)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("version", 99, "format version 99, this msf-faiss reads 2; use the release that wrote it"),
        ("format", "something else", "not that of an msf-faiss checkpoint"),
        ("files", [], "lacks or garbles"),
        ("files", {"../../model.safetensors": {"bytes": 1, "sha256": ""}}, "refused: ../../model.safetensors"),
        ("step", None, "lacks or garbles"),
    ],
)
def test_a_manifest_that_says_something_strange(saved: Path, key: str, value: object, complaint: str) -> None:
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
def test_a_pickle_is_refused_and_not_executed(saved: Path, tmp_path: Path, writer: str) -> None:
    """Beside the tensors, and in their place under a manifest that vouches for it."""
    for name in ("extra.pt", "model.safetensors"):
        with (saved / name).open("wb") as file:
            if writer == "torch":
                torch.save(Poison(tmp_path / "executed"), file)
            else:
                pickle.dump(Poison(tmp_path / "executed"), file)
        with pytest.raises(UserError, match=r"refused: extra.pt does not belong into a checkpoint"):
            find_checkpoint(saved)
    (saved / "extra.pt").unlink()
    content = (saved / "model.safetensors").read_bytes()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(saved, lambda manifest: manifest["files"].update({"model.safetensors": facts}))
    with pytest.raises(UserError, match="refused: it is a pickle, which can execute code"):
        load_model(find_checkpoint(saved), CPU)
    with pytest.raises(UserError, match="refused: it is a pickle, which can execute code"):
        TrainState.create(CONFIG, CPU).restore(find_newest_valid(saved.parents[1])[0])
    assert not (tmp_path / "executed").exists()


def test_places_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory or checkpoint"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a run directory"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has not saved a checkpoint yet"):
        find_checkpoint(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="not a checkpoint of msf-faiss, which is a directory"):
        find_checkpoint(tmp_path / "model.pth")


def test_a_damaged_newest_checkpoint_names_the_one_before(tmp_path: Path, state: TrainState) -> None:
    older, newer = save(tmp_path, state, 7), save(tmp_path, state, 9)
    (newer / "bank.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"damaged.*the checkpoint before it is {older}"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(older).step == 7


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_are_loaded_strictly(tmp_path: Path, state: TrainState, change: str) -> None:
    tensors = {name: dict(values) for name, values in state.tensors().items()}
    key = "online.projector.0.weight"
    if change == "missing":
        del tensors["model"][key]
    elif change == "unexpected":
        tensors["model"]["module.encoder_q.fc.weight"] = torch.zeros(1)
    else:
        tensors["model"][key] = torch.zeros(2, 2)
    path = save_checkpoint(tmp_path, step=1, epoch=1, config=CONFIG, dataset_size=9, tensors=tensors)
    with pytest.raises(UserError, match="weights do not fit the config"):
        load_model(find_checkpoint(path), CPU)
    with pytest.raises(UserError, match="does not fit its config"):
        TrainState.create(CONFIG, CPU).restore(find_checkpoint(path))


def test_a_bank_that_is_none(tmp_path: Path, state: TrainState) -> None:
    for step, bank in enumerate(({"queue": torch.zeros(3, 4)}, {"embeddings": torch.zeros(3), "ids": torch.zeros(3)})):
        tensors = {**state.tensors(), "bank": bank}
        path = save_checkpoint(tmp_path, step=step, epoch=1, config=CONFIG, dataset_size=9, tensors=tensors)
        with pytest.raises(UserError, match="holds no bank"):
            load_bank(find_checkpoint(path), CPU)


def test_a_bank_of_an_engine_that_is_not_here_is_searched_by_another(tmp_path: Path, state: TrainState) -> None:
    config = CONFIG.model_copy(update={"bank": FlatBankConfig(capacity=20, engine="streams")})
    path = save_checkpoint(tmp_path, step=1, epoch=1, config=config, dataset_size=90, tensors=state.tensors())
    assert len(load_bank(find_checkpoint(path), CPU)) == 20


def test_a_bank_that_a_device_cannot_search_is_not_called_damaged(tmp_path: Path, state: TrainState) -> None:
    config = CONFIG.model_copy(update={"bank": IvfBankConfig(capacity=20)})
    path = save_checkpoint(tmp_path, step=1, epoch=1, config=config, dataset_size=90, tensors=state.tensors())
    with pytest.raises(UserError, match=r"its bank cannot be searched on meta: .* choose kind flat or scan"):
        load_bank(find_checkpoint(path), torch.device("meta"))


@pytest.mark.parametrize(("capacity", "entries"), [(20, 20), ("dataset", 90), ("0.001MB", 100)])
def test_a_bank_is_loaded_with_the_capacity_that_it_had(
    tmp_path: Path, state: TrainState, capacity: int | str, entries: int
) -> None:
    """A capacity that is no number means something only together with the data set, or with the weight of an entry."""
    config = CONFIG.model_copy(update={"bank": FlatBankConfig(capacity=capacity, dtype="bfloat16")})
    assert state.bank.dim == 1  # so that an entry weighs 2 + 8 bytes
    path = save_checkpoint(tmp_path, step=1, epoch=1, config=config, dataset_size=90, tensors=state.tensors())
    bank = load_bank(find_checkpoint(path), CPU)
    assert (len(bank), bank.capacity) == (20, entries)


def test_a_full_disk_leaves_the_earlier_checkpoint(
    saved: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = safetensors.torch.save_file

    def fill_up(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.name.startswith("bank"):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written(tensors, path)

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", fill_up)
    with pytest.raises(UserError, match=f"cannot save step 8: the disk is full; make room .*{saved}"):
        save(saved.parents[1], state, 8)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert find_checkpoint(saved.parents[1]).step == 7


def test_an_interrupted_save_leaves_nothing(saved: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(saved.parents[1], state, 8)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_checkpoint_is_never_replaced(saved: Path, state: TrainState) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(UserError, match="cannot save step 7"):
        save(saved.parents[1], state)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path, state: TrainState) -> None:
    paths = [save(tmp_path, state, step) for step in (7, 9, 11, 13)]
    (paths[3] / "manifest.json").unlink()
    content = bytearray((paths[2] / "bank.safetensors").read_bytes())
    content[-1] ^= 1
    (paths[2] / "bank.safetensors").write_bytes(content)
    found, damaged = find_newest_valid(tmp_path)
    assert (found.path, found.verified) == (paths[1], True)
    assert list(damaged) == [paths[3], paths[2]]
    assert "manifest.json is missing" in damaged[paths[3]]
    assert "bank.safetensors is not what was saved" in damaged[paths[2]]
    assert quarantine(paths[3]).name == "damaged-step-00000013"
    paths[3].mkdir()  # it happens again
    assert quarantine(paths[3]).name == "damaged-step-00000013-2"
    assert find_newest_valid(tmp_path)[1].keys() == {paths[2]}


def test_where_every_checkpoint_is_damaged_nothing_is_changed(tmp_path: Path, state: TrainState) -> None:
    for step in (7, 9):
        (save(tmp_path, state, step) / "rng.safetensors").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"no checkpoint of the run is whole(.|\n)*step-00000009(.|\n)*step-00000007"):
        find_newest_valid(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in permissions must not send the run back to an older checkpoint."""
    save(tmp_path, state, 7)
    save(tmp_path, state, 9)

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "_sha256", refuse)
    with pytest.raises(UserError, match=r"step-00000009/.*: cannot be read: permission denied"):
        find_newest_valid(tmp_path)


def test_what_a_killed_process_left_is_ignored_and_removed(saved: Path) -> None:
    left = saved.with_name(".saving-step-00000009")
    shutil.copytree(saved, left)
    assert find_checkpoint(saved.parents[1]).path == saved
    remove_incomplete(saved.parents[1])
    assert not left.exists()
    assert saved.exists()


def test_retention_keeps_the_newest_and_the_chosen(tmp_path: Path, state: TrainState) -> None:
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, state, step)
    prune_checkpoints(tmp_path, keep_last=2, keep=lambda step: step % 4 == 0)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000008",
        "step-00000010",
    ]
