"""CIFAR-10, CIFAR-100 and STL-10, downloaded and verified by torchvision."""

from typing import Any, Literal

import torch
from torchvision import datasets

from msf_faiss.config import TorchvisionData
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.errors import UserError


def torchvision_source(config: TorchvisionData, split: Literal["train", "test"]) -> MemorySource:
    """The training or test images in memory. STL-10's training images are 5,000 labelled and 100,000 unlabelled ones.

    Raises:
        UserError: if the data set is damaged, or missing and cannot or may not be downloaded.
    """
    try:
        opened = _open(config, split)
    except (OSError, RuntimeError, EOFError, ValueError) as error:  # urllib's and tarfile's errors are OSErrors
        remedy = (
            f"check the connection, or download it elsewhere and copy it to {config.root}"
            if config.download
            else "set data.download=true, or data.root to the folder that contains it"
        )
        raise UserError(f"{config.kind} cannot be opened in {config.root}: {error}; {remedy}") from error
    images = torch.from_numpy(opened.data)
    if config.kind != "stl10":
        images = images.permute(0, 3, 1, 2).contiguous()
    labels = opened.labels if config.kind == "stl10" else opened.targets
    return MemorySource(images, labels, opened.classes, title=f"{config.kind} {split}")


def _open(config: TorchvisionData, split: Literal["train", "test"]) -> Any:
    if config.kind == "stl10":
        part = "train+unlabeled" if split == "train" else "test"
        return datasets.STL10(config.root, split=part, download=config.download)
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[config.kind]
    return kind(config.root, train=split == "train", download=config.download)
