"""The training state: everything that a step changes, and its tensors in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from msf_faiss.bank import Bank, create_bank
from msf_faiss.bank.parallel import load_shards
from msf_faiss.checkpoint.format import Checkpoint, Tensors
from msf_faiss.config import Config
from msf_faiss.distributed.batch_norm import shuffle_rows, synchronize_batch_norm
from msf_faiss.distributed.ranks import ALONE, Ranks, data_parallel
from msf_faiss.errors import UserError
from msf_faiss.models import MeanShift, best_memory_format, build_model, compile_model
from msf_faiss.train.optimizer import create_optimizer
from msf_faiss.train.overlap import Retriever, create_retriever


@dataclass(slots=True)
class TrainState:
    """Everything that changes during training. Data order and views are functions of the seed and the step."""

    model: MeanShift
    optimizer: torch.optim.Optimizer
    bank: Bank
    ranks: Ranks = ALONE
    shuffle_seed: int | None = None  # seeds the exchange of target images between ranks; None: no exchange
    step: int = 0  # finished steps
    network: nn.Module = field(init=False)  # the model; its backward averages gradients over the ranks
    retrieve: Retriever = field(init=False)

    def __post_init__(self) -> None:
        first = next(self.model.parameters())
        self.network = data_parallel(self.model, self.ranks, torch.zeros(2, 3, 32, 32).to(first))
        self.retrieve = create_retriever(self.bank, self.device)

    @property
    def device(self) -> torch.device:
        """Device of the networks; the bank may be on another one."""
        return next(self.model.parameters()).device

    @classmethod
    def create(
        cls, config: Config, device: torch.device, *, images: int | None = None, ranks: Ranks = ALONE
    ) -> TrainState:
        """The state before the first step; all ranks call this together.

        Args:
            config: of the run.
            device: of this rank.
            images: number of training images, for `bank.capacity: dataset`.

        Raises:
            UserError: if the bank does not fit into memory, or does not support `device`.
        """
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
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"bank: {error}") from error
        return cls(
            model=model,
            optimizer=create_optimizer(model, config.optimizer),
            bank=bank,
            ranks=ranks,
            shuffle_seed=config.seed if ranks.size > 1 and config.train.batch_norm == "shuffle_bn" else None,
        )

    def embed_target(self, images: Tensor, micro_batches: int = 1) -> Tensor:
        """Target embeddings [B, D] of `images` [B, 3, S, S] in so many forwards, possibly computed on other ranks.

        With batch statistics per rank, target and online encoder would normalise the same images together; the authors'
        code therefore shuffles them between ranks, as MoCo (He et al., CVPR 2020), section 3.3.
        """
        if self.shuffle_seed is None:
            return torch.cat([self.model.embed_target(part) for part in images.tensor_split(micro_batches)])
        layout = best_memory_format(self.model, images.device)
        others, undo = shuffle_rows(images, self.ranks, seed=self.shuffle_seed, step=self.step)
        others = others.contiguous(memory_format=layout)
        return undo(torch.cat([self.model.embed_target(part) for part in others.tensor_split(micro_batches)]))

    def tensors(self) -> dict[str, Tensors]:
        """The tensors that this rank saves, by file and name."""
        part = self.bank.layout()
        if part.size > 1:
            files = {f"bank-{part.rank:05d}-of-{part.size:05d}": self.bank.state_dict()}
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
        """Continue from a checkpoint of the same model, saved by any number of ranks; all ranks call this together.

        Raises:
            UserError: if it is damaged or its contents do not fit.
        """
        parameters = dict(self.model.named_parameters())
        rng = checkpoint.tensors("rng")
        shards = checkpoint.bank_files
        try:
            self.model.load_state_dict(checkpoint.tensors("model"), strict=True)
            for name, momentum in checkpoint.tensors("optimizer").items():
                # In the memory format of the parameter: the fused step iterates over both in memory order.
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
