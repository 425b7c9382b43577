"""The formats of an export, which encoders each can hold, and how a network is described."""

from typing import Any, Literal

from msf_faiss.config import TorchvisionBackbone
from msf_faiss.embeddings.encoder import TrainedEncoder
from msf_faiss.errors import UserError

Format = Literal["torchvision", "timm", "safetensors", "onnx"]


def describe_architecture(encoder: TrainedEncoder) -> dict[str, Any]:
    """What is needed to rebuild the network, as JSON values."""
    projector = encoder.network.get_parameter("projector.0.weight") if encoder.projector else None
    return {
        "backbone": encoder.checkpoint.config.model.backbone.model_dump(mode="json"),
        "features": encoder.feature_dim,
        "projector": None if projector is None else {"hidden": len(projector), "dim": encoder.dim},
    }


def describe_backbone(encoder: TrainedEncoder) -> str:
    """The backbone in a few words."""
    backbone = encoder.checkpoint.config.model.backbone
    if isinstance(backbone, TorchvisionBackbone):
        return backbone.name + ("" if backbone.stem == "imagenet" else " with a CIFAR stem")
    return f"narrow ResNet, width {backbone.width}, {sum(backbone.depths)} blocks"


def check_exportable(encoder: TrainedEncoder, format: Format) -> None:
    """Check that `format` can hold the encoder, and that its weights are finite.

    Raises:
        UserError: if not; it names the formats that can.
    """
    if not all(tensor.isfinite().all() for tensor in encoder.state_dict().values()):
        raise UserError(
            f"{encoder.checkpoint.path}: the {encoder.name} encoder has weights that are not finite, because training "
            "diverged; export an earlier checkpoint"
        )
    if format not in ("torchvision", "timm"):
        return
    if encoder.projector:
        raise UserError(
            f"--format {format} --projector: the networks of {format} have no projector; leave out --projector, or use "
            "--format safetensors or onnx"
        )
    backbone = encoder.checkpoint.config.model.backbone
    if not isinstance(backbone, TorchvisionBackbone):
        raise UserError(
            f"--format {format}: {format} does not have this network ({describe_backbone(encoder)}); use --format "
            "safetensors or onnx"
        )
    if format == "timm" and backbone.stem == "cifar":
        raise UserError(
            f"--format timm: timm's {backbone.name} does not have the CIFAR stem, a 3×3 convolution without pooling; "
            "use --format torchvision (the model card shows how to change the stem), safetensors or onnx"
        )
