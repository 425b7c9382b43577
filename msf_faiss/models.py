"""Backbones, heads, and the pair of encoders that mean shift trains.

Shapes: B images, S height and width of a view, F features of the backbone, D dimensions of an embedding.
"""

import copy
import os
import shutil

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from msf_faiss.config import BackboneConfig, ModelConfig, NarrowBackbone
from msf_faiss.errors import UserError

_LEAST_DIM = 64  # embeddings of fewer dimensions by default cost accuracy (docs/log.md)
_COMPILERS = (os.environ.get("CXX", "g++"), "clang++")


class _NarrowResNet(nn.Module):
    """A small ResNet of basic blocks: [B, 3, S, S] -> [B, F], F = width * 2^(stages - 1).

    A 3×3 stem without pooling, one stage for each of `depths`, then global average pooling.
    """

    def __init__(self, width: int, depths: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        stages: list[nn.Module] = []
        channels = width
        for stage, (depth, stride) in enumerate(zip(depths, strides, strict=True)):
            out = width * 2**stage
            for block in range(depth):
                step = stride if block == 0 else 1
                shortcut = None
                if step != 1 or channels != out:
                    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=step, bias=False), nn.BatchNorm2d(out))
                stages.append(BasicBlock(channels, out, step, shortcut))
                channels = out
        self.stages = nn.Sequential(*stages)
        self.feature_dim = channels
        for module in self.modules():  # the initialisation of torchvision's ResNets
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.stages(self.stem(images))  # [B, F, s, s]
        return features.mean(dim=(2, 3))


class Encoder(nn.Module):
    """A backbone followed by a projector: [B, 3, S, S] -> [B, D], not normalised."""

    def __init__(self, backbone: nn.Module, feature_dim: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(feature_dim, hidden, dim)
        self.feature_dim = feature_dim
        self.dim = dim

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.projector(self.backbone(images))
        return embeddings


class MeanShift(nn.Module):
    """The online encoder g with its predictor h, and the target encoder f, a moving average of g.

    MSF (Koohpayegani et al., ICCV 2021), section 3. All three run in train mode: the target's BatchNorm statistics come
    from its own forward passes.
    """

    def __init__(self, online: Encoder, hidden: int, *, predictor: bool = True) -> None:
        super().__init__()
        self.online = online
        self.predictor = mlp(online.dim, hidden, online.dim) if predictor else nn.Identity()
        self.target = copy.deepcopy(online).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Query embeddings v = normalize(h(g(x))), with gradients: [B, 3, S, S] -> [B, D], float32 or float64."""
        return _normalize(self.predictor(self.online(images)))

    @torch.no_grad()
    def embed_target(self, images: Tensor) -> Tensor:
        """Target embeddings u = normalize(f(x)), without gradients: [B, 3, S, S] -> [B, D], float32 or float64."""
        return _normalize(self.target(images))

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """EMA update of the target's parameters: f <- momentum f + (1 - momentum) g; buffers stay as they are."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), 1 - momentum)


def build_model(config: ModelConfig, *, seed: int) -> MeanShift:
    """A new model on the CPU. `seed` alone determines its weights; torch's global generator is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, feature_dim = build_backbone(config.backbone)
        hidden = config.hidden or 2 * feature_dim
        dim = config.dim or max(_LEAST_DIM, feature_dim // 4)
        return MeanShift(Encoder(backbone, feature_dim, hidden, dim), hidden, predictor=config.predictor)


def best_memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """The memory format in which `model` runs fastest on `device`: channels last, unless that is unsafe.

    On the CPU, in channels last, the backward of a strided 1×1 convolution with fewer than 16 channels writes out of
    bounds (with torch 2.15 at 128 px the process crashes).
    """
    unsafe = device.type == "cpu" and any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels < 16
        for module in model.modules()
    )
    return torch.contiguous_format if unsafe else torch.channels_last


def compile_model(model: MeanShift) -> None:
    """Compile both forwards of `model` when they are first called, by torch.compile; its state_dict keeps its names.

    Raises:
        UserError: if the model is on the CPU and no C++ compiler is installed.
    """
    if next(model.parameters()).device.type == "cpu" and not any(map(shutil.which, _COMPILERS)):
        raise UserError(
            f"train.compile: on the CPU it needs a C++ compiler, but neither {' nor '.join(_COMPILERS)} is installed; "
            "install one, or set train.compile=false"
        )
    model.compile()
    model.target.compile()


def build_backbone(config: BackboneConfig) -> tuple[nn.Module, int]:
    """A backbone [B, 3, S, S] -> [B, F], and F. Its weights are drawn from torch's global generator."""
    if isinstance(config, NarrowBackbone):
        narrow = _NarrowResNet(config.width, config.depths, config.strides)
        return narrow, narrow.feature_dim
    resnet: ResNet = torchvision.models.get_model(config.name, weights=None)
    feature_dim = resnet.fc.in_features
    resnet.fc = nn.Identity()
    if config.stem == "cifar":
        resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
        resnet.maxpool = nn.Identity()
    return resnet, feature_dim


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear - BatchNorm - ReLU - Linear: the architecture of the projector and the predictor."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs)
    )


def _normalize(embeddings: Tensor) -> Tensor:
    wide = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    return F.normalize(wide, dim=1)
