"""The model and the bank of a checkpoint, for any use but further training."""

from typing import Literal

import torch

from msf_faiss.bank import Bank, create_bank
from msf_faiss.bank.parallel import load_shards, saved_capacity
from msf_faiss.checkpoint.format import ENDING, Checkpoint, describe_damage
from msf_faiss.errors import UserError
from msf_faiss.models import MeanShift, build_model

EncoderName = Literal["online", "target"]
"""online: the encoder that is trained; target: its exponential moving average."""


def load_model(checkpoint: Checkpoint, device: torch.device) -> MeanShift:
    """The model of a checkpoint, in train mode, on `device`. Its weights must fit one by one.

    Raises:
        UserError: if a weight is missing, unexpected or of another shape, or the file is damaged.
    """
    model = build_model(checkpoint.config.model, seed=0)
    try:
        model.load_state_dict(checkpoint.tensors("model"), strict=True)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise UserError(f"{checkpoint.path}: the weights do not fit the checkpoint's config: {details}") from error
    return model.to(device)


def load_bank(checkpoint: Checkpoint, device: torch.device) -> Bank:
    """The bank of a checkpoint on `device`, all shards merged, with the capacity of the run.

    Raises:
        UserError: if the saved bank does not fit the config, its kind cannot search on `device`, or a file is damaged.
    """
    shards = checkpoint.bank_files
    first = shards[0] if shards else "bank"
    state = checkpoint.tensors(first)
    config = checkpoint.config.bank.model_copy(update={"placement": "replicated"})
    if config.kind == "flat":
        config = config.model_copy(update={"engine": "auto"})  # the run's engine may not exist on this machine
    try:
        dim = state["embeddings"].shape[1]
        if (capacity := saved_capacity(state)) is not None:
            config = config.model_copy(update={"capacity": capacity})
    except (KeyError, IndexError) as error:
        raise UserError(_not_a_bank(checkpoint, first, error)) from error
    try:
        bank = create_bank(config, dim=dim, device=device, images=checkpoint.dataset_size)
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: its bank cannot be searched on {device}: {error}") from error
    try:
        load_shards(bank, len(shards), lambda number: checkpoint.tensors(shards[number]))
    except UserError:
        raise
    except (KeyError, ValueError) as error:
        raise UserError(_not_a_bank(checkpoint, first, error)) from error
    return bank


def _not_a_bank(checkpoint: Checkpoint, name: str, error: Exception) -> str:
    return describe_damage(checkpoint.path, f"{name}{ENDING} is not a bank: {error}")
