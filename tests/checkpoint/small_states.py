"""A small training state with a full bank, and how it is saved."""

from pathlib import Path

import torch

from msf_faiss.checkpoint.save import save_checkpoint
from msf_faiss.config import Config, FlatBankConfig, ModelConfig, NarrowBackbone
from msf_faiss.train.state import TrainState

CONFIG = Config(
    seed=4,
    model=ModelConfig(backbone=NarrowBackbone(width=4, depths=(1,), strides=(2,)), dim=1),
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
