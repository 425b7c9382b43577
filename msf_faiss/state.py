"""The state of a training run: what a step changes, and what a checkpoint holds of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from msf_faiss.bank import Bank, create_bank
from msf_faiss.bank.parallel import ShardedBank, load_shards
from msf_faiss.batch_norm import shuffled, synchronised
from msf_faiss.checkpoint import Checkpoint, Tensors
from msf_faiss.config import Config, OptimizerConfig
from msf_faiss.distributed import Ranks, data_parallel
from msf_faiss.errors import UserError
from msf_faiss.models import MeanShift, build_model, memory_format


@dataclass(slots=True)
class TrainState:
    """All that changes while training. Data order and views are functions of the seed and the step."""

    model: MeanShift
    optimizer: torch.optim.SGD
    bank: Bank
    ranks: Ranks = field(default_factory=Ranks.alone)
    shuffle_seed: int | None = None  # of the order in which ranks exchange the target's images; None: they do not
    step: int = 0  # finished steps
    network: nn.Module = field(init=False)  # the model, with its gradients averaged over the ranks

    def __post_init__(self) -> None:
        first = next(self.model.parameters())
        self.network = data_parallel(self.model, self.ranks, torch.zeros(2, 3, 32, 32).to(first))

    @classmethod
    def create(
        cls, config: Config, device: torch.device, *, images: int | None = None, ranks: Ranks | None = None
    ) -> TrainState:
        """The state before the first step; all ranks take part.

        Args:
            config: of the run.
            device: of this rank.
            images: size of the data set, for a bank of that size.
            ranks: that train together; None: this process alone.

        Raises:
            UserError: if the bank does not fit into memory, or not on `device`.
        """
        ranks = ranks or Ranks.alone()
        model = build_model(config.model, seed=config.seed)
        model = model.to(device, memory_format=memory_format(model, device))  # type: ignore[call-overload]
        if config.train.batch_norm == "sync":
            model = synchronised(model, ranks)
        try:
            bank = create_bank(
                config.bank,
                dim=model.online.dim,
                device=device,
                images=images,
                batch=config.train.batch_size,
                ranks=ranks,
            )
        except ValueError as error:
            raise UserError(f"bank: {error}") from error
        return cls(
            model=model,
            optimizer=create_optimizer(model, config.optimizer),
            bank=bank,
            ranks=ranks,
            shuffle_seed=config.seed if ranks.size > 1 and config.train.batch_norm == "shuffle_bn" else None,
        )

    def embed_target(self, images: Tensor) -> Tensor:
        """Target embeddings [B, D] of `images` [B, 3, S, S], perhaps computed on other ranks.

        Where batch statistics are each rank's own, which images are normalised together would otherwise be the same for
        the target as for the online encoder (the authors' code shuffles for that reason, after MoCo).
        """
        if self.shuffle_seed is None:
            return self.model.embed_target(images)
        layout = memory_format(self.model, images.device)
        others, undo = shuffled(images, self.ranks, seed=self.shuffle_seed, step=self.step)
        return undo(self.model.embed_target(others.contiguous(memory_format=layout)))

    def tensors(self) -> dict[str, Tensors]:
        """What this rank writes into a checkpoint: for each of its files, tensors by name."""
        if isinstance(self.bank, ShardedBank):
            files = {f"bank-{self.ranks.rank:05d}-of-{self.ranks.size:05d}": self.bank.state_dict()}
        else:
            files = {"bank": self.bank.state_dict()} if self.ranks.is_main else {}
        if not self.ranks.is_main:
            return files
        momenta = {
            name: self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.model.named_parameters()
            if self.optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
        }
        rng = {"cpu": torch.get_rng_state()}
        if self.bank.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.bank.device)
        return {"model": self.model.state_dict(), "optimizer": momenta, **files, "rng": rng}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same model, written by any number of ranks; all ranks take part.

        Raises:
            UserError: if it is damaged or its contents do not fit.
        """
        parameters = dict(self.model.named_parameters())
        rng = checkpoint.tensors("rng")
        shards = checkpoint.bank_files
        try:
            self.model.load_state_dict(checkpoint.tensors("model"), strict=True)
            for name, momentum in checkpoint.tensors("optimizer").items():
                # A copy: what was read is a view of the file, which will be deleted some time.
                self.optimizer.state[parameters[name]]["momentum_buffer"] = momentum.to(self.bank.device, copy=True)
            load_shards(self.bank, len(shards), lambda number: checkpoint.tensors(shards[number]))
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.bank.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.bank.device)
        except UserError:
            raise
        except (KeyError, RuntimeError, ValueError) as error:
            complaint = " ".join(str(error).split())
            raise UserError(f"{checkpoint.path}: the checkpoint does not fit its config: {complaint}") from error
        self.step = checkpoint.step


def create_optimizer(model: MeanShift, config: OptimizerConfig) -> torch.optim.SGD:
    """SGD over the online encoder and the predictor; the learning rate is set at each step."""
    trained = [*model.online.parameters(), *model.predictor.parameters()]
    return torch.optim.SGD(trained, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)
