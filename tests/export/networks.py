"""Backbones to export."""

from collections.abc import Callable

from msf_faiss.checkpoint.format import Checkpoint
from msf_faiss.config import NarrowBackbone, TorchvisionBackbone

MakeCheckpoint = Callable[..., Checkpoint]

NARROW = NarrowBackbone(width=4, depths=(1, 2), strides=(1, 2))
CIFAR = TorchvisionBackbone(name="resnet18", stem="cifar")
