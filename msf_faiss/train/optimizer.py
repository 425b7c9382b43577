"""The optimizer, and the schedules of its learning rate and of the EMA momentum."""

import math
from dataclasses import dataclass

import torch

from msf_faiss.config import Config, OptimizerConfig
from msf_faiss.errors import UserError
from msf_faiss.models import MeanShift


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that depends on the step number alone. Steps are counted from 0."""

    config: Config
    steps_per_epoch: int

    @property
    def scheduled_steps(self) -> int:
        """Length of the schedules: `train.epochs` in steps."""
        return self.config.train.epochs * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Length of the run, which `train.max_steps` may end before its schedules."""
        return min(self.scheduled_steps, self.config.train.max_steps or self.scheduled_steps)

    def epoch(self, finished: int) -> float:
        """Epochs in `finished` steps."""
        return finished / self.steps_per_epoch

    def is_due(self, finished: int, every_epochs: int | None) -> bool:
        """Whether a task due every `every_epochs` epochs and at the end of the run is due after `finished` steps."""
        if every_epochs is None:
            return False
        return finished == self.total_steps or finished % (every_epochs * self.steps_per_epoch) == 0

    def learning_rate(self, step: int) -> float:
        """Learning rate of `step`: a linear warm-up, then a cosine to zero (or a constant).

        The cosine covers the steps after the warm-up; with `schedule: epoch` it is constant within an epoch, as in the
        authors' code.
        """
        config = self.config.optimizer
        peak = config.peak(self.config.train.batch_size)
        warmup = round(config.warmup_epochs * self.steps_per_epoch)
        if step < warmup:
            return peak * (step + 1) / warmup
        if config.schedule == "constant":
            return peak
        if config.schedule == "epoch":
            step = max(warmup, step - step % self.steps_per_epoch)
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.scheduled_steps - warmup)))

    def ema_momentum(self, step: int) -> float:
        """EMA momentum of the target at `step`: constant, or on a half cosine from the initial to the final one."""
        first, final = self.config.target.momentum, self.config.target.final_momentum
        if final is None or self.scheduled_steps <= 1:
            return first
        progress = step / (self.scheduled_steps - 1)
        return final - (final - first) * 0.5 * (1 + math.cos(math.pi * progress))


def create_optimizer(model: MeanShift, config: OptimizerConfig) -> torch.optim.Optimizer:
    """SGD or LARS over the online encoder and the predictor. Each step sets its own learning rate.

    Raises:
        UserError: if `kind` is lars and timm is not installed.
    """
    trained = [*model.online.parameters(), *model.predictor.parameters()]
    if config.kind == "sgd":
        return torch.optim.SGD(
            trained, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
    try:
        from timm.optim.lars import Lars
    except ImportError as error:
        raise UserError(
            "optimizer.kind: lars needs timm, which is not installed. Run pip install 'msf-faiss[lars]', or choose sgd"
        ) from error
    adapted = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]  # biases, weights of batch norms
    groups = [
        {"params": adapted, "weight_decay": config.weight_decay, "always_adapt": True},
        {"params": others, "weight_decay": 0.0},
    ]
    lars: torch.optim.Optimizer = Lars(
        groups, lr=config.learning_rate, momentum=config.momentum, trust_coeff=config.trust
    )
    return lars
