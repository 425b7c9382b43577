import itertools
import math

import pytest

from msf_faiss.config import OptimizerConfig, TargetConfig
from msf_faiss.train.optimizer import ema_momentum, learning_rate


def rates(config: OptimizerConfig, steps_per_epoch: int, epochs: int, batch_size: int = 256) -> list[float]:
    total = steps_per_epoch * epochs
    return [
        learning_rate(step, config=config, batch_size=batch_size, steps_per_epoch=steps_per_epoch, total_steps=total)
        for step in range(total)
    ]


def test_the_papers_cosine_stands_still_within_an_epoch() -> None:
    found = rates(OptimizerConfig(learning_rate=0.05), 3, 4)
    expected = [0.05 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(3)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_cosine_by_step_falls_every_step_towards_zero() -> None:
    found = rates(OptimizerConfig(learning_rate=0.1, schedule="step"), 5, 4)
    assert found[0] == 0.1
    assert all(later < earlier for earlier, later in itertools.pairwise(found))
    assert 0 < found[-1] < 0.001


def test_a_warm_up_rises_to_the_peak_and_the_cosine_takes_the_rest() -> None:
    config = OptimizerConfig(learning_rate=0.1, schedule="step", warmup_epochs=1.5)
    found = rates(config, 4, 4)
    assert found[:6] == pytest.approx([0.1 * (step + 1) / 6 for step in range(6)])
    assert found[6] == 0.1
    assert found[6:] == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])
    by_epoch = rates(OptimizerConfig(learning_rate=0.1, warmup_epochs=1.5), 4, 4)
    assert by_epoch[:6] == found[:6]
    assert by_epoch[6] == by_epoch[7] == 0.1
    assert len(set(by_epoch[8:12])) == 1


def test_a_constant_rate_is_constant_after_its_warm_up() -> None:
    found = rates(OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_epochs=1), 2, 3)
    assert found == [0.05, 0.1, 0.1, 0.1, 0.1, 0.1]


def test_momentum_rises_to_the_final_one() -> None:
    assert {ema_momentum(s, config=TargetConfig(), total_steps=9) for s in range(9)} == {0.99}
    rising = TargetConfig(momentum=0.97, final_momentum=1.0)
    found = [ema_momentum(step, config=rising, total_steps=11) for step in range(11)]
    assert found[0] == pytest.approx(0.97)
    assert found[5] == pytest.approx(0.985)
    assert found[-1] == 1.0
    assert found == sorted(found)
    assert ema_momentum(0, config=rising, total_steps=1) == 0.97


def test_the_rate_is_scaled_to_the_batch_if_asked() -> None:
    plain = OptimizerConfig(learning_rate=0.05, warmup_epochs=1)
    scaled = OptimizerConfig(learning_rate=0.05, warmup_epochs=1, base_batch_size=256)
    assert rates(plain, 3, 4, batch_size=1024) == rates(plain, 3, 4)
    assert rates(scaled, 3, 4, batch_size=1024) == pytest.approx([4 * rate for rate in rates(plain, 3, 4)])
