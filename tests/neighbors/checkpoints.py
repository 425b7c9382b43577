"""Checkpoints over image files of noise, and a simple float64 embedding to compare with."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from msf_faiss.bank import FlatBank, RingSpec
from msf_faiss.checkpoint.format import Checkpoint, find_checkpoint
from msf_faiss.checkpoint.save import save_checkpoint
from msf_faiss.config import Config, FlatBankConfig, FolderData, ModelConfig, NarrowBackbone, ViewsConfig
from msf_faiss.models import MeanShift, build_model

CLASSES = ("<b>bold", "cat", "dog")
SIZE = 16


def write_images(folder: Path) -> Path:
    """24 images of noise, 8 per class, in the size of a view."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for index in range(8):
            pixels = rng.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def config_of(folder: Path, **data: object) -> Config:
    return Config(
        data=FolderData(path=folder, workers=0, **data),
        views=ViewsConfig(size=SIZE),
        model=ModelConfig(backbone=NarrowBackbone(width=8, depths=(1,), strides=(2,)), dim=8),
        bank=FlatBankConfig(capacity=32),
    )


def target_of(config: Config, seed: int = 0) -> MeanShift:
    """A model whose target has other weights and batch statistics than a new one."""
    model = build_model(config.model, seed=seed)
    torch.manual_seed(1)
    for _ in range(3):
        model.target(torch.randn(16, 3, SIZE, SIZE))
    return model


def embed(model: MeanShift, path: Path) -> torch.Tensor:
    """The embedding [D] of one image in float64."""
    pixels = np.asarray(Image.open(path), np.float64) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    target = model.target.double().eval()
    with torch.no_grad():
        embedding = target(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    return embedding / embedding.norm()


def files_of(folder: Path) -> list[Path]:
    """The image files, by id."""
    return sorted(folder.glob("*/*.png"))


def save(
    run: Path, config: Config, ids: list[int], *, dataset_size: int = 24, step: int = 7, seed: int = 0
) -> Checkpoint:
    """A checkpoint whose bank has embeddings of the images `ids` with noise, pushed in this order."""
    model = target_of(config, seed)
    bank = FlatBank(RingSpec(config.bank.capacity, 8))
    if ids:
        noise = 0.05 * torch.randn(len(ids), 8, generator=torch.Generator().manual_seed(2))
        files = files_of(config.data.path)
        vectors = torch.stack([embed(target_of(config, seed), files[index % len(files)]) for index in ids]) + noise
        bank.push(torch.nn.functional.normalize(vectors, dim=1).float(), torch.tensor(ids))
    tensors = {"model": model.state_dict(), "bank": bank.state_dict()}
    save_checkpoint(run, step=step, epoch=step / 4, config=config, dataset_size=dataset_size, tensors=tensors)
    return find_checkpoint(run)
