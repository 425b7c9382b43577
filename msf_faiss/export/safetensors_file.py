"""A safetensors file that also describes its network, so that `load_export` can rebuild it."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from msf_faiss.config import BackboneConfig
from msf_faiss.config.base import Positive
from msf_faiss.embeddings.encoder import TrainedEncoder
from msf_faiss.errors import UserError
from msf_faiss.export.torchvision_timm import WEIGHTS, weights_of
from msf_faiss.files import kind_of
from msf_faiss.models import build_backbone, mlp

METADATA = "msf_faiss"
"""The only key of the file's metadata, a JSON text: with several keys the bytes of the file would vary."""


class _Projector(BaseModel):
    model_config = ConfigDict(extra="forbid")
    hidden: Positive
    dim: Positive


class _Architecture(BaseModel):
    backbone: BackboneConfig
    projector: _Projector | None


def write_safetensors(encoder: TrainedEncoder, folder: Path, metadata: dict[str, Any]) -> None:
    """Write model.safetensors. With a projector, names start with `backbone.` or `projector.`.

    Args:
        encoder: see `embeddings.encoder.load_encoder`.
        folder: to write to.
        metadata: of the file; must contain `architecture`.

    Raises:
        OSError: if the file cannot be written.
    """
    content = safetensors.torch.save(weights_of(encoder), {METADATA: json.dumps(metadata, sort_keys=True)})
    (folder / WEIGHTS).write_bytes(content)


def load_export(path: Path | str) -> nn.Module:
    """The network of a safetensors export: normalised images [B, 3, S, S] -> [B, F], on the CPU, in eval mode.

    Args:
        path: the folder of the export, or the file in it.

    Raises:
        UserError: if the file cannot be read, does not describe its network, or a weight is missing or unexpected.
    """
    path = Path(path)
    file = path / WEIGHTS if kind_of(path) == "folder" else path
    try:
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{file}: cannot be read as safetensors: {error}; give the folder of a safetensors export"
        ) from error
    try:
        facts = json.loads(metadata[METADATA])
        architecture = _Architecture.model_validate(facts["architecture"])
    except (KeyError, TypeError, json.JSONDecodeError, ValidationError) as error:
        raise UserError(
            f"{file}: does not describe its network; give a file that `msf-faiss export --format safetensors` wrote"
        ) from error
    # On the meta device nothing is allocated or initialised: the file's tensors become the weights.
    with torch.device("meta"):
        network = _network(architecture)
    try:
        network.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"{file}: the weights do not fit the network: {' '.join(str(error).split())}") from error
    return network.eval()


def _network(architecture: _Architecture) -> nn.Module:
    backbone, features = build_backbone(architecture.backbone)
    if architecture.projector is None:
        return backbone
    head = mlp(features, architecture.projector.hidden, architecture.projector.dim)
    return nn.Sequential(OrderedDict(backbone=backbone, projector=head))
