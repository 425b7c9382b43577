"""Pure functions of the step: the learning rate and the target's momentum. A step is counted from 0."""

from __future__ import annotations

import math

from msf_faiss.config import OptimizerConfig, TargetConfig


def learning_rate(
    step: int, *, config: OptimizerConfig, batch_size: int, steps_per_epoch: int, total_steps: int
) -> float:
    """Learning rate of step number `step`: a linear warm-up, then a cosine to zero (or a constant).

    The cosine runs over what the warm-up leaves of `total_steps`; with `schedule: epoch` it stands still within an
    epoch, as in the authors' code.
    """
    peak = config.peak(batch_size)
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    if config.schedule == "epoch":
        step = max(warmup, step - step % steps_per_epoch)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def ema_momentum(step: int, *, config: TargetConfig, total_steps: int) -> float:
    """EMA momentum of step number `step`: constant, or from the first to the final one on a half cosine."""
    if config.final_momentum is None or total_steps <= 1:
        return config.momentum
    progress = step / (total_steps - 1)
    return config.final_momentum - (config.final_momentum - config.momentum) * 0.5 * (1 + math.cos(math.pi * progress))
