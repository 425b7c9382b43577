from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from untrained import save_untrained

from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.checkpoint.load import load_model
from msf_faiss.config import Config, DemoData, ModelConfig, NarrowBackbone, ViewsConfig
from msf_faiss.embeddings.encoder import load_encoder
from msf_faiss.errors import UserError
from msf_faiss.views.random_view import center_crop, normalize


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    config = Config(
        data=DemoData(images=20, size=16),
        views=ViewsConfig(size=16, eval_resize=20, mean=(0.4, 0.5, 0.6)),
        model=ModelConfig(backbone=NarrowBackbone(width=4, depths=(1,), strides=(2,)), dim=8),
    )
    save_untrained(config, run_dir, images=20)
    return run_dir


@pytest.mark.parametrize("name", ["online", "target"])
@pytest.mark.parametrize(("projector", "dim"), [(False, 4), (True, 8)])
def test_load_encoder_selects_encoder_and_layer(run: Path, name: str, projector: bool, dim: int) -> None:
    encoder = load_encoder(str(run), name, projector=projector)  # type: ignore[arg-type]
    assert (encoder.dim, encoder.feature_dim, encoder.image_size, encoder.resize) == (dim, 4, 16, 20)
    assert (encoder.mean, encoder.name) == ((0.4, 0.5, 0.6), name)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    whole = getattr(load_model(find_checkpoint(run), torch.device("cpu")).eval(), name)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(encoder(images), (whole if projector else whole.backbone)(images))
    assert torch.equal(load_encoder(find_checkpoint(run), name, projector=projector)(images), encoder(images))  # type: ignore[arg-type]


def test_preprocess_gives_the_evaluation_view_of_files_pil_images_and_tensors(run: Path, tmp_path: Path) -> None:
    encoder = load_encoder(run)
    views = encoder.checkpoint.config.views
    pixels = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = normalize(center_crop([tensor], views), views)[0]
    image = Image.fromarray(pixels)
    image.save(tmp_path / "photo.png")
    for given in (tensor, image, tmp_path / "photo.png", str(tmp_path / "photo.png")):
        found = encoder.preprocess(given)
        assert torch.equal(found, expected)
        assert (found.shape, found.dtype) == ((3, 16, 16), torch.float32)
    gray = Image.fromarray(pixels[:, :, 0])
    assert torch.equal(encoder.preprocess(gray), encoder.preprocess(gray.convert("RGB")))


def test_preprocess_leaves_the_pil_image_unchanged(run: Path) -> None:
    image = Image.new("RGB", (20, 30))
    image.getexif()[0x0112] = 6  # orientation: rotated by 90 degrees
    load_encoder(run).preprocess(image)
    assert image.size == (20, 30)


def test_preprocess_refuses_other_inputs(run: Path, tmp_path: Path) -> None:
    encoder = load_encoder(run)
    with pytest.raises(ValueError, match=r"expected uint8 RGB \[3, H, W\], got torch.float32 \[3, 20, 20\]"):
        encoder.preprocess(torch.zeros(3, 20, 20))
    with pytest.raises(ValueError, match=r"got torch.uint8 \[20, 20, 3\]"):
        encoder.preprocess(torch.zeros(20, 20, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"missing\.png: cannot"):
        encoder.preprocess(tmp_path / "missing.png")


def test_load_encoder_refuses_a_directory_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run directory"):
        load_encoder(tmp_path)
