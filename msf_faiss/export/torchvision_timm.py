"""The weights of an encoder in the formats of torchvision and timm."""

import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from msf_faiss.config import TorchvisionBackbone
from msf_faiss.embeddings.encoder import TrainedEncoder

WEIGHTS = "model.safetensors"
_TIMM_CONFIG = "config.json"


def write_torchvision(encoder: TrainedEncoder, folder: Path) -> None:
    """Write NAME.pth, a state_dict that torchvision's model NAME loads strictly once its `fc` is an `nn.Identity`.

    Raises:
        OSError: if the file cannot be written.
    """
    with (folder / f"{_architecture(encoder)}.pth").open("wb") as file:
        torch.save(weights_of(encoder), file)


def write_timm(encoder: TrainedEncoder, folder: Path) -> None:
    """Write model.safetensors and config.json, which `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    So does timm from a repository of the Hugging Face hub. Layers and weights have the same names in timm's ResNets as
    in torchvision's.

    Raises:
        OSError: if a file cannot be written.
    """
    config = {
        "architecture": _architecture(encoder),
        "num_classes": 0,
        "num_features": encoder.dim,
        "global_pool": "avg",
        "pretrained_cfg": {
            "tag": "msf",
            "custom_load": False,
            "input_size": [3, encoder.image_size, encoder.image_size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": _crop_ratio(encoder.image_size, encoder.resize),
            "crop_mode": "center",
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "num_classes": 0,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights_of(encoder)))
    (folder / _TIMM_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _crop_ratio(size: int, resize: int) -> float:
    """timm's `crop_pct`: crop size by shorter side. timm recomputes the side as floor(size / ratio)."""
    ratio = size / resize
    return ratio if math.floor(size / ratio) == resize else size / (resize + 0.5)


def weights_of(encoder: TrainedEncoder) -> dict[str, Tensor]:
    """The network's parameters and BatchNorm statistics by name, contiguous."""
    state: dict[str, Any] = encoder.network.state_dict()
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def _architecture(encoder: TrainedEncoder) -> str:
    backbone = encoder.checkpoint.config.model.backbone
    assert isinstance(backbone, TorchvisionBackbone), "check_exportable allows no other"
    return backbone.name
