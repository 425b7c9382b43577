"""Schedules and optimizers, compared with the formulas of their papers."""

import builtins
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from msf_faiss.config import Config, DemoData, ModelConfig, NarrowBackbone, OptimizerConfig, TargetConfig, TrainConfig
from msf_faiss.errors import UserError
from msf_faiss.models import MeanShift, build_model
from msf_faiss.train.optimizer import Schedule, create_optimizer


def rates(config: OptimizerConfig, steps_per_epoch: int, epochs: int, batch_size: int = 256) -> list[float]:
    train = TrainConfig(epochs=epochs, batch_size=batch_size)
    schedule = Schedule(Config(data=DemoData(), optimizer=config, train=train), steps_per_epoch)
    return [schedule.learning_rate(step) for step in range(schedule.total_steps)]


def momenta(config: TargetConfig, steps: int) -> list[float]:
    schedule = Schedule(Config(data=DemoData(), target=config, train=TrainConfig(epochs=1)), steps)
    return [schedule.ema_momentum(step) for step in range(steps)]


def test_cosine_by_epoch_is_constant_within_an_epoch() -> None:
    found = rates(OptimizerConfig(learning_rate=0.05), 3, 4)
    expected = [0.05 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(3)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_cosine_by_step_decreases_every_step_towards_zero() -> None:
    found = rates(OptimizerConfig(learning_rate=0.1, schedule="step"), 5, 4)
    assert found[0] == 0.1
    assert all(later < earlier for earlier, later in itertools.pairwise(found))
    assert 0 < found[-1] < 0.001


def test_warm_up_rises_to_the_peak_and_the_cosine_covers_the_rest() -> None:
    config = OptimizerConfig(learning_rate=0.1, schedule="step", warmup_epochs=1.5)
    found = rates(config, 4, 4)
    assert found[:6] == pytest.approx([0.1 * (step + 1) / 6 for step in range(6)])
    assert found[6] == 0.1
    assert found[6:] == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])
    by_epoch = rates(OptimizerConfig(learning_rate=0.1, warmup_epochs=1.5), 4, 4)
    assert by_epoch[:6] == found[:6]
    assert by_epoch[6] == by_epoch[7] == 0.1
    assert len(set(by_epoch[8:12])) == 1


def test_constant_rate_after_warm_up() -> None:
    found = rates(OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_epochs=1), 2, 3)
    assert found == [0.05, 0.1, 0.1, 0.1, 0.1, 0.1]


def test_momentum_rises_to_the_final_momentum() -> None:
    assert set(momenta(TargetConfig(), 9)) == {0.99}
    rising = TargetConfig(momentum=0.97, final_momentum=1.0)
    found = momenta(rising, 11)
    assert found[0] == pytest.approx(0.97)
    assert found[5] == pytest.approx(0.985)
    assert found[-1] == 1.0
    assert found == sorted(found)
    assert momenta(rising, 1) == [0.97]


def test_base_batch_size_scales_the_rate_to_the_batch() -> None:
    plain = OptimizerConfig(learning_rate=0.05, warmup_epochs=1)
    scaled = OptimizerConfig(learning_rate=0.05, warmup_epochs=1, base_batch_size=256)
    assert rates(plain, 3, 4, batch_size=1024) == rates(plain, 3, 4)
    assert rates(scaled, 3, 4, batch_size=1024) == pytest.approx([4 * rate for rate in rates(plain, 3, 4)])


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
    """You et al. 2017, algorithm 1; biases and batch norms use plain SGD without weight decay."""
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


def test_lars_without_timm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_timm(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("timm"):
            raise ImportError(name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(UserError, match=r"pip install 'msf-faiss\[lars\]', or choose sgd"):
        create_optimizer(model(), OptimizerConfig(kind="lars"))
