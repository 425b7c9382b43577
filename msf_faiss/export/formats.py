"""The weights of an encoder as torchvision and timm read them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from msf_faiss.config import TorchvisionBackbone, ViewsConfig
from msf_faiss.export.encoder import ExportedEncoder

WEIGHTS = "model.safetensors"
TIMM_CONFIG = "config.json"


def write_torchvision(encoder: ExportedEncoder, folder: Path) -> None:
    """A state dict NAME.pth that torchvision's NAME takes strictly, its `fc` being an identity.

    Raises:
        OSError: if it cannot be written.
    """
    assert isinstance(encoder.backbone, TorchvisionBackbone)
    with (folder / f"{encoder.backbone.name}.pth").open("wb") as file:
        torch.save(weights(encoder), file)


def write_timm(encoder: ExportedEncoder, folder: Path) -> None:
    """model.safetensors and the config.json beside it, as `timm.create_model("local-dir:FOLDER", pretrained=True)` and
    timm's part of the Hugging Face hub read them.

    timm's ResNets have the names of torchvision's, layers and weights alike.

    Raises:
        OSError: if they cannot be written.
    """
    assert isinstance(encoder.backbone, TorchvisionBackbone)
    views = encoder.views
    config = {
        "architecture": encoder.backbone.name,
        "num_classes": 0,
        "num_features": encoder.dim,
        "global_pool": "avg",
        "pretrained_cfg": {
            "tag": "msf",
            "custom_load": False,
            "input_size": [3, views.size, views.size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": crop_share(views),
            "crop_mode": "center",
            "mean": list(views.mean),
            "std": list(views.std),
            "num_classes": 0,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights(encoder)))
    (folder / TIMM_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def crop_share(views: ViewsConfig) -> float:
    """The share of the shorter side that the centre crop has. timm finds that side again by floor(size / share)."""
    share = views.size / views.resize
    return share if math.floor(views.size / share) == views.resize else views.size / (views.resize + 0.5)


def weights(encoder: ExportedEncoder) -> dict[str, Tensor]:
    """The encoder's parameters and batch statistics by name, contiguous."""
    state: dict[str, Any] = encoder.network.state_dict()
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}
