"""The state of a training run: what a step changes, and what a checkpoint holds of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from msf_faiss.bank import Bank, create_bank
from msf_faiss.bank.parallel import ShardedBank, load_shards
from msf_faiss.checkpoint.format import Checkpoint, Tensors
from msf_faiss.config import Config, OptimizerConfig
from msf_faiss.distributed.batch_norm import shuffle_rows, synchronize_batch_norm
from msf_faiss.distributed.ranks import Ranks, data_parallel
from msf_faiss.errors import UserError
from msf_faiss.models import MeanShift, best_memory_format, build_model, compile_model
from msf_faiss.train.overlap import Retriever, retriever


@dataclass(slots=True)
class TrainState:
    """All that changes while training. Data order and views are functions of the seed and the step."""

    model: MeanShift
    optimizer: torch.optim.Optimizer
    bank: Bank
    ranks: Ranks = field(default_factory=Ranks.alone)
    shuffle_seed: int | None = None  # of the order in which ranks exchange the target's images; None: they do not
    step: int = 0  # finished steps
    network: nn.Module = field(init=False)  # the model, with its gradients averaged over the ranks
    retrieve: Retriever = field(init=False)

    def __post_init__(self) -> None:
        first = next(self.model.parameters())
        self.network = data_parallel(self.model, self.ranks, torch.zeros(2, 3, 32, 32).to(first))
        self.retrieve = retriever(self.bank, self.device)

    @property
    def device(self) -> torch.device:
        """Where the networks are; the bank may be elsewhere."""
        return next(self.model.parameters()).device

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
        model = model.to(device, memory_format=best_memory_format(model, device))  # type: ignore[call-overload]
        if config.train.batch_norm == "sync":
            model = synchronize_batch_norm(model, ranks)
        if config.train.compile:
            compile_model(model)
        try:
            bank = create_bank(
                config.bank,
                dim=model.online.dim,
                device=torch.device("cpu") if config.bank.device == "cpu" else device,
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

    def embed_target(self, images: Tensor, parts: int = 1) -> Tensor:
        """Target embeddings [B, D] of `images` [B, 3, S, S] in so many parts, perhaps computed on other ranks.

        Where batch statistics are each rank's own, which images are normalised together would otherwise be the same for
        the target as for the online encoder (the authors' code shuffles for that reason, after MoCo).
        """
        if self.shuffle_seed is None:
            return torch.cat([self.model.embed_target(part) for part in images.tensor_split(parts)])
        layout = best_memory_format(self.model, images.device)
        others, undo = shuffle_rows(images, self.ranks, seed=self.shuffle_seed, step=self.step)
        others = others.contiguous(memory_format=layout)
        return undo(torch.cat([self.model.embed_target(part) for part in others.tensor_split(parts)]))

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
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
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
                # In the parameter's own layout: the fused step walks through both as they lie in memory.
                buffer = torch.empty_like(parameters[name], requires_grad=False)
                self.optimizer.state[parameters[name]]["momentum_buffer"] = buffer.copy_(momentum)
            load_shards(self.bank, len(shards), lambda number: checkpoint.tensors(shards[number]))
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.device)
        except UserError:
            raise
        except (KeyError, RuntimeError, ValueError) as error:
            complaint = " ".join(str(error).split())
            raise UserError(f"{checkpoint.path}: the checkpoint does not fit its config: {complaint}") from error
        self.step = checkpoint.step


def create_optimizer(model: MeanShift, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of the online encoder and the predictor; the learning rate is set at each step.

    Raises:
        UserError: if it is LARS and timm, whose it is, is not installed.
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
            "optimizer.kind lars needs timm, which is not installed: pip install 'msf-faiss[lars]', or choose sgd"
        ) from error
    tensors = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]  # biases, and all of the batch norms'
    groups = [
        {"params": tensors, "weight_decay": config.weight_decay, "always_adapt": True},
        {"params": others, "weight_decay": 0.0},
    ]
    lars: torch.optim.Optimizer = Lars(
        groups, lr=config.learning_rate, momentum=config.momentum, trust_coeff=config.trust
    )
    return lars
