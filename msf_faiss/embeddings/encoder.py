"""A trained encoder with the preprocessing that its evaluations use.

Shapes: B images, S pixels of a view's side, F dimensions of a feature.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from msf_faiss.checkpoint.format import Checkpoint, find_checkpoint
from msf_faiss.checkpoint.load import EncoderName, load_model
from msf_faiss.data.sources.decode import decode_file
from msf_faiss.data.sources.to_rgb import to_rgb
from msf_faiss.device import CPU, select_device
from msf_faiss.models import Encoder
from msf_faiss.text import printable
from msf_faiss.views.random_view import center_crop, normalize


class TrainedEncoder(nn.Module):
    """The encoder of a checkpoint, frozen and in eval mode: preprocessed images [B, 3, S, S] -> features [B, F].

    Attributes:
        network: the network itself: the backbone, or an `Encoder` of backbone and projector.
        checkpoint: where the weights come from.
        name: "online", the encoder that was trained, or "target", its moving average.
        projector: whether the features are the projector's output.
        feature_dim: dimensions of the backbone's output.
        dim: F, dimensions of a feature.
        image_size: S, in pixels.
        resize: length in pixels to which preprocessing resizes the shorter side, before it crops the centre.
        mean, std: of the normalisation, for each of R, G, B in the range 0 to 1.
    """

    def __init__(self, encoder: Encoder, checkpoint: Checkpoint, name: EncoderName, *, projector: bool) -> None:
        super().__init__()
        self.network: nn.Module = encoder if projector else encoder.backbone
        self.checkpoint, self.name, self.projector = checkpoint, name, projector
        self.feature_dim = encoder.feature_dim
        self.dim = encoder.dim if projector else encoder.feature_dim
        views = checkpoint.config.views
        self.image_size, self.resize = views.size, views.resize
        self.mean, self.std = views.mean, views.std
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features

    def preprocess(self, image: Image.Image | Tensor | Path | str) -> Tensor:
        """Resize, centre-crop and normalise an image, as the evaluations do: float32 [3, S, S] on the CPU.

        Args:
            image: a PIL image, the path of an image file, or uint8 RGB [3, H, W].

        Raises:
            UserError: if the file cannot be read as an image.
            ValueError: if a tensor has another shape or dtype.
        """
        if isinstance(image, Image.Image):
            pixels = to_rgb(image)
        elif isinstance(image, Tensor):
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
                raise ValueError(f"expected uint8 RGB [3, H, W], got {image.dtype} {list(image.shape)}")
            pixels = image.cpu()
        else:
            pixels = decode_file(Path(image), lambda: printable(image))
        views = self.checkpoint.config.views
        return normalize(center_crop([pixels], views), views)[0]


def load_encoder(
    run: Path | str | Checkpoint,
    encoder: EncoderName = "online",
    *,
    projector: bool = False,
    device: torch.device | str = CPU,
) -> TrainedEncoder:
    """Load an encoder of a checkpoint.

    Args:
        run: run directory, whose newest checkpoint is used, or checkpoint directory.
        encoder: "online", the encoder that was trained, or "target", its moving average.
        projector: return the projector's output instead of the backbone's.
        device: where to compute; "auto" is CUDA if it is available.

    Raises:
        UserError: if there is no checkpoint, or its weights are damaged or do not fit its config.
    """
    checkpoint = run if isinstance(run, Checkpoint) else find_checkpoint(Path(run))
    model = load_model(checkpoint, CPU)
    loaded = TrainedEncoder(
        model.online if encoder == "online" else model.target, checkpoint, encoder, projector=projector
    )
    return loaded.to(device if isinstance(device, torch.device) else select_device(device))
