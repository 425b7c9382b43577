"""The optimizers, beside what their papers say."""

import builtins
from typing import Any

import pytest
import torch
from torch import Tensor

from msf_faiss.config import ModelConfig, NarrowBackbone, OptimizerConfig
from msf_faiss.errors import UserError
from msf_faiss.models import MeanShift, build_model
from msf_faiss.train.state import create_optimizer

RATE, MOMENTUM, DECAY, TRUST = 0.5, 0.9, 0.01, 0.02


def model() -> MeanShift:
    return build_model(ModelConfig(backbone=NarrowBackbone(width=4, depths=(1,), strides=(2,)), dim=8), seed=0)


def gradients(of: MeanShift, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    trained = {name: p for name, p in of.named_parameters() if p.requires_grad}
    return {name: torch.randn(p.shape, generator=generator) for name, p in trained.items()}


def stepped(config: OptimizerConfig, steps: int) -> dict[str, Tensor]:
    trained = model()
    optimizer = create_optimizer(trained, config)
    for step in range(steps):
        for name, gradient in gradients(trained, step).items():
            trained.get_parameter(name).grad = gradient
        optimizer.step()
    return {name: p.detach() for name, p in trained.named_parameters() if p.requires_grad}


def test_sgd_step_by_step() -> None:
    config = OptimizerConfig(learning_rate=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    found = stepped(config, 3)
    for name, weight in model().named_parameters():
        if not weight.requires_grad:
            continue
        weight, velocity = weight.detach().double(), torch.zeros(weight.shape, dtype=torch.float64)
        for step in range(3):
            velocity = MOMENTUM * velocity + gradients(model(), step)[name] + DECAY * weight
            weight = weight - RATE * velocity
        torch.testing.assert_close(found[name].double(), weight, rtol=1e-5, atol=1e-6)  # float32 against float64


@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_lars_step_by_step(decay: float) -> None:
    """You et al. 2017, algorithm 1; biases and batch norms by plain SGD without decay."""
    config = OptimizerConfig(kind="lars", learning_rate=RATE, momentum=MOMENTUM, weight_decay=decay, trust=TRUST)
    found = stepped(config, 3)
    for name, weight in model().named_parameters():
        if not weight.requires_grad:
            continue
        adapted = weight.ndim > 1
        weight, velocity = weight.detach().double(), torch.zeros(weight.shape, dtype=torch.float64)
        for step in range(3):
            gradient = gradients(model(), step)[name].double()
            local = TRUST * weight.norm() / (gradient.norm() + decay * weight.norm()) if adapted else 1.0
            velocity = MOMENTUM * velocity + local * (gradient + (decay * weight if adapted else 0))
            weight = weight - RATE * velocity
        torch.testing.assert_close(found[name].double(), weight, rtol=1e-5, atol=1e-6)  # float32 against float64


def test_lars_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_timm(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("timm"):
            raise ImportError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(UserError, match=r"pip install 'msf-faiss\[lars\]', or choose sgd"):
        create_optimizer(model(), OptimizerConfig(kind="lars"))
