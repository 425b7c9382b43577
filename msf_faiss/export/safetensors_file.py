"""An encoder as a file of tensors that says how its network is built, and the network of such a file."""

from __future__ import annotations

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
from msf_faiss.config.schema import Positive
from msf_faiss.errors import UserError
from msf_faiss.export.encoder import ExportedEncoder
from msf_faiss.export.formats import WEIGHTS, weights
from msf_faiss.models import build_backbone, mlp

METADATA = "msf_faiss"
"""Key of the facts about the weights, as JSON. It is the only one: of several the file's bytes would have any order."""


class _Projector(BaseModel):
    model_config = ConfigDict(extra="forbid")
    hidden: Positive
    dim: Positive


class _Architecture(BaseModel):
    backbone: BackboneConfig
    projector: _Projector | None


def write_safetensors(encoder: ExportedEncoder, folder: Path, facts: dict[str, Any]) -> None:
    """model.safetensors, of the backbone's names; with a projector those begin with `backbone.` and `projector.`.

    Args:
        encoder: its weights.
        folder: to write to.
        facts: go into the file's metadata, `architecture` among them.

    Raises:
        OSError: if it cannot be written.
    """
    metadata = {METADATA: json.dumps(facts, sort_keys=True)}
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights(encoder), metadata))


def load_export(path: Path | str) -> nn.Module:
    """The network of an export as safetensors: [B, 3, S, S] normalised -> [B, F], on the CPU, in eval mode.

    Args:
        path: the export's folder, or the file in it.

    Raises:
        UserError: if there is no such file, it says nothing of its network, or a weight is missing or too many.
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    try:
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors: {error}; give the folder of an export") from error
    try:
        facts = json.loads(metadata[METADATA])
        architecture = _Architecture.model_validate(facts["architecture"])
    except (KeyError, TypeError, json.JSONDecodeError, ValidationError) as error:
        raise UserError(
            f"{file}: does not say how its network is built; `msf-faiss export --format safetensors` writes files that "
            "do"
        ) from error
    # On the meta device nothing is allocated or drawn: the file's tensors become the weights.
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
