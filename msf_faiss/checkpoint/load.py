"""The model and the bank of a checkpoint, for those who do not train on with them."""

from __future__ import annotations

from typing import Literal

import torch

from msf_faiss.bank import Bank, create_bank
from msf_faiss.bank.parallel import load_shards, saved_capacity
from msf_faiss.checkpoint.format import ENDING, Checkpoint, damaged
from msf_faiss.errors import UserError
from msf_faiss.models import Encoder, MeanShift, build_model

EncoderName = Literal["online", "target"]
"""The encoder that is trained, and the moving average that follows it."""


def load_model(checkpoint: Checkpoint, device: torch.device) -> MeanShift:
    """The model of a checkpoint, in train mode, on `device`. A missing or unexpected weight is an error.

    Raises:
        UserError: if the weights do not fit the config, or the file is damaged.
    """
    model = build_model(checkpoint.config.model, seed=0)
    try:
        model.load_state_dict(checkpoint.tensors("model"), strict=True)
    except RuntimeError as error:
        complaint = " ".join(str(error).split())
        raise UserError(
            f"{checkpoint.path}: the weights do not fit the config saved beside them: {complaint}"
        ) from error
    return model.to(device)


def load_encoder(checkpoint: Checkpoint, name: EncoderName) -> Encoder:
    """One of a checkpoint's two encoders, frozen, in eval mode, on the CPU.

    Raises:
        UserError: as `load_model` does.
    """
    model = load_model(checkpoint, torch.device("cpu"))
    encoder = model.online if name == "online" else model.target
    return encoder.requires_grad_(False).eval()


def load_bank(checkpoint: Checkpoint, device: torch.device) -> Bank:
    """The bank of a checkpoint, whole, on `device`, with the capacity that it had.

    Raises:
        UserError: if the saved bank does not fit the config, its kind cannot be searched on `device`, or a file is
            damaged.
    """
    shards = checkpoint.bank_files
    where = f"{shards[0]}{ENDING}" if shards else f"bank{ENDING}"
    state = checkpoint.tensors(where.removesuffix(ENDING))
    config = checkpoint.config.bank.model_copy(update={"placement": "replicated"})
    if config.kind == "flat":
        config = config.model_copy(update={"engine": "auto"})  # the run's may not exist here
    try:
        dim = state["embeddings"].shape[1]
        if (capacity := saved_capacity(state)) is not None:
            config = config.model_copy(update={"capacity": capacity})
    except (KeyError, IndexError) as error:
        raise UserError(damaged(checkpoint.path, f"{where} holds no bank: {error}")) from error
    try:
        bank = create_bank(config, dim=dim, device=device, images=checkpoint.dataset_size)
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: its bank cannot be searched on {device}: {error}") from error
    try:
        load_shards(bank, len(shards), lambda number: checkpoint.tensors(shards[number]))
    except UserError:
        raise
    except (KeyError, ValueError) as error:
        raise UserError(damaged(checkpoint.path, f"{where} holds no bank: {error}")) from error
    return bank
