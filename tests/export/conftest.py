"""Checkpoints of networks that were never trained, but have batch statistics and biases as if they were."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import MakeCheckpoint

from msf_faiss.checkpoint import Checkpoint, find_checkpoint, save_checkpoint
from msf_faiss.config import (
    BackboneConfig,
    Config,
    DemoData,
    ModelConfig,
    TorchvisionBackbone,
    ViewsConfig,
)
from msf_faiss.models import build_model


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """The checkpoint of a backbone, made once; `run` names the copy of the run that the test may change."""
    made: dict[str, Path] = {}

    def make(backbone: BackboneConfig | str, *, size: int = 64, **views: Any) -> Checkpoint:
        if isinstance(backbone, str):
            backbone = TorchvisionBackbone.model_validate({"name": backbone})
        config = Config(
            data=DemoData(images=40, test_images=10, size=16),
            views=ViewsConfig(size=size, **views),
            model=ModelConfig(backbone=backbone, hidden=24, dim=16),
        )
        key = config.model_dump_json()
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "run"
            _save(config, made[key])
        return find_checkpoint(made[key])

    return make


def _save(config: Config, run_dir: Path) -> None:
    model = build_model(config.model, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(2):  # batch statistics, each encoder's own
            for encoder in (model.online, model.target):
                encoder(torch.randn(4, 3, config.views.size, config.views.size, generator=generator))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # weights and biases of batch norms begin as ones and zeros
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_checkpoint(run_dir, step=12, epoch=1.5, config=config, dataset_size=40, tensors={"model": model.state_dict()})


@pytest.fixture
def run_of(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run of a backbone, which the test may change."""

    def copy(*arguments: Any, **options: Any) -> Path:
        run_dir = checkpoint_of(*arguments, **options).run_dir
        assert run_dir is not None
        return shutil.copytree(run_dir, tmp_path / "run", copy_function=os.link)

    return copy
