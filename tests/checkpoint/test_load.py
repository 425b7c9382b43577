from pathlib import Path

import pytest
import torch
from small_states import CONFIG, CPU

from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.checkpoint.load import load_bank, load_model
from msf_faiss.checkpoint.save import save_checkpoint
from msf_faiss.config import FlatBankConfig, IvfBankConfig
from msf_faiss.errors import UserError
from msf_faiss.train.state import TrainState


def test_load_restores_every_tensor_bit_for_bit(saved: Path, state: TrainState) -> None:
    found = find_checkpoint(saved)
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


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_load_model_is_strict(tmp_path: Path, state: TrainState, change: str) -> None:
    tensors = {name: dict(values) for name, values in state.tensors().items()}
    key = "online.projector.0.weight"
    if change == "missing":
        del tensors["model"][key]
    elif change == "unexpected":
        tensors["model"]["module.encoder_q.fc.weight"] = torch.zeros(1)
    else:
        tensors["model"][key] = torch.zeros(2, 2)
    path = save_checkpoint(tmp_path, step=1, epoch=1, config=CONFIG, dataset_size=9, tensors=tensors)
    with pytest.raises(UserError, match="weights do not fit the checkpoint's config"):
        load_model(find_checkpoint(path), CPU)
    with pytest.raises(UserError, match="does not fit its config"):
        TrainState.create(CONFIG, CPU).restore(find_checkpoint(path))


def test_load_bank_refuses_other_tensors(tmp_path: Path, state: TrainState) -> None:
    for step, bank in enumerate(({"queue": torch.zeros(3, 4)}, {"embeddings": torch.zeros(3), "ids": torch.zeros(3)})):
        tensors = {**state.tensors(), "bank": bank}
        path = save_checkpoint(tmp_path, step=step, epoch=1, config=CONFIG, dataset_size=9, tensors=tensors)
        with pytest.raises(UserError, match=r"bank\.safetensors is not a bank"):
            load_bank(find_checkpoint(path), CPU)


def test_load_bank_replaces_an_engine_that_is_missing_here(tmp_path: Path, state: TrainState) -> None:
    config = CONFIG.model_copy(update={"bank": FlatBankConfig(capacity=20, engine="streams")})
    path = save_checkpoint(tmp_path, step=1, epoch=1, config=config, dataset_size=90, tensors=state.tensors())
    assert len(load_bank(find_checkpoint(path), CPU)) == 20


def test_load_bank_refuses_a_device_that_cannot_search_it(tmp_path: Path, state: TrainState) -> None:
    config = CONFIG.model_copy(update={"bank": IvfBankConfig(capacity=20)})
    path = save_checkpoint(tmp_path, step=1, epoch=1, config=config, dataset_size=90, tensors=state.tensors())
    with pytest.raises(UserError, match=r"its bank cannot be searched on meta: .* choose bank.kind flat"):
        load_bank(find_checkpoint(path), torch.device("meta"))


@pytest.mark.parametrize(("capacity", "entries"), [(20, 20), ("dataset", 90), ("0.001MB", 100)])
def test_load_bank_keeps_the_capacity_of_the_run(
    tmp_path: Path, state: TrainState, capacity: int | str, entries: int
) -> None:
    """Whether it was given as a number, by the data set, or in bytes."""
    config = CONFIG.model_copy(update={"bank": FlatBankConfig(capacity=capacity, dtype="bfloat16")})
    assert state.bank.dim == 1  # an entry takes 2 + 8 bytes
    path = save_checkpoint(tmp_path, step=1, epoch=1, config=config, dataset_size=90, tensors=state.tensors())
    bank = load_bank(find_checkpoint(path), CPU)
    assert (len(bank), bank.capacity) == (20, entries)
