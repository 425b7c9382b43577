"""The encoder that is taken home: one of a checkpoint's two, with or without its projector.

Shapes: B images, S height and width of a view, F features or dimensions of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from msf_faiss.checkpoint.format import Checkpoint
from msf_faiss.checkpoint.load import EncoderName, load_encoder
from msf_faiss.config import BackboneConfig, TorchvisionBackbone, ViewsConfig
from msf_faiss.errors import UserError

Format = Literal["torchvision", "timm", "safetensors", "onnx"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedEncoder:
    """An encoder of a checkpoint, on the CPU."""

    checkpoint: Checkpoint
    name: EncoderName
    projector: bool  # whether the projector follows the backbone
    network: nn.Module  # [B, 3, S, S] normalised views -> [B, F], frozen, in eval mode
    feature_dim: int  # of the backbone
    hidden: int | None  # width of the projector; None: there is none
    dim: int  # F

    @property
    def backbone(self) -> BackboneConfig:
        return self.checkpoint.config.model.backbone

    @property
    def views(self) -> ViewsConfig:
        return self.checkpoint.config.views

    @property
    def architecture(self) -> dict[str, Any]:
        """What is needed to build the network, for programs."""
        projector = {"hidden": self.hidden, "dim": self.dim} if self.projector else None
        return {
            "backbone": self.backbone.model_dump(mode="json"),
            "features": self.feature_dim,
            "projector": projector,
        }

    @property
    def title(self) -> str:
        """The backbone in a few words."""
        backbone = self.backbone
        if isinstance(backbone, TorchvisionBackbone):
            return backbone.name + ("" if backbone.stem == "imagenet" else " with a CIFAR stem")
        return f"narrow ResNet, width {backbone.width}, {sum(backbone.depths)} blocks"


def exported_encoder(
    checkpoint: Checkpoint, name: EncoderName = "online", *, projector: bool = False
) -> ExportedEncoder:
    """An encoder of a checkpoint.

    Raises:
        UserError: if the weights are damaged, do not fit the config one by one, or are not finite.
    """
    encoder = load_encoder(checkpoint, name)
    if not all(tensor.isfinite().all() for tensor in encoder.state_dict().values()):
        raise UserError(
            f"{checkpoint.path}: the {name} encoder has weights that are not finite: training has diverged; export an "
            "earlier checkpoint"
        )
    return ExportedEncoder(
        checkpoint=checkpoint,
        name=name,
        projector=projector,
        network=encoder if projector else encoder.backbone,
        feature_dim=encoder.feature_dim,
        hidden=next(encoder.projector.parameters()).shape[0] if projector else None,
        dim=encoder.dim if projector else encoder.feature_dim,
    )


def refuse_unfit(encoder: ExportedEncoder, format: Format) -> None:
    """Refuse a format that has no place for the encoder.

    Raises:
        UserError: naming those that have.
    """
    if format not in ("torchvision", "timm"):
        return
    if encoder.projector:
        raise UserError(
            f"--format {format} --projector: {format}'s networks have no projector; leave it out, or choose --format "
            "safetensors or onnx"
        )
    backbone = encoder.backbone
    if not isinstance(backbone, TorchvisionBackbone):
        raise UserError(
            f"--format {format}: {format} has no such network ({encoder.title}); choose --format safetensors or onnx"
        )
    if format == "timm" and backbone.stem == "cifar":
        raise UserError(
            f"--format timm: timm's {backbone.name} has another stem than this one, a 3×3 convolution without pooling; "
            "choose --format torchvision (two lines change its stem, which the card has), safetensors or onnx"
        )
