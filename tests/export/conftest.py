"""Runs of untrained networks to export."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from networks import MakeCheckpoint
from untrained import save_untrained

from msf_faiss.checkpoint.format import Checkpoint, find_checkpoint
from msf_faiss.config import (
    BackboneConfig,
    Config,
    DemoData,
    ModelConfig,
    TorchvisionBackbone,
    ViewsConfig,
)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Returns the checkpoint of a backbone, saved once; tests must not change it."""
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
            save_untrained(config, made[key], images=40)
        return find_checkpoint(made[key])

    return make


@pytest.fixture
def run_of(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> Callable[..., Path]:
    """Returns a copy of the run of a backbone, which the test may change."""

    def copy(*arguments: Any, **options: Any) -> Path:
        run_dir = checkpoint_of(*arguments, **options).run_dir
        assert run_dir is not None
        return shutil.copytree(run_dir, tmp_path / "run", copy_function=os.link)

    return copy
