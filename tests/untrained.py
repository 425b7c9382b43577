"""Checkpoints of untrained networks whose BatchNorm statistics and biases look trained."""

from pathlib import Path

import torch
from torch import Tensor

from msf_faiss.bank import Bank
from msf_faiss.checkpoint.save import save_checkpoint
from msf_faiss.config import Config
from msf_faiss.models import build_model


def save_untrained(config: Config, run_dir: Path, *, images: int, bank: Bank | None = None) -> Path:
    """Save a checkpoint of step 12, of a run on a data set of `images` images."""
    model = build_model(config.model, seed=3)
    generator = torch.Generator().manual_seed(0)
    size = config.views.size
    with torch.no_grad():
        for _ in range(2):
            for encoder in (model.online, model.target):
                encoder(torch.randn(4, 3, size, size, generator=generator))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # weights and biases of batch norms start as ones and zeros
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tensors: dict[str, dict[str, Tensor]] = {"model": model.state_dict()}
    if bank is not None:
        tensors["bank"] = bank.state_dict()
    return save_checkpoint(run_dir, step=12, epoch=1.5, config=config, dataset_size=images, tensors=tensors)
