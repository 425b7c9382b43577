"""Each export, loaded by the library that it is for, computes the same features as the checkpoint's encoder."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from networks import CIFAR, NARROW, MakeCheckpoint
from PIL import Image
from torch import Tensor, nn

from msf_faiss.checkpoint.format import Checkpoint
from msf_faiss.checkpoint.load import EncoderName, load_model
from msf_faiss.embeddings.encoder import load_encoder
from msf_faiss.errors import UserError
from msf_faiss.export import export_encoder, load_export
from msf_faiss.export.formats import Format
from msf_faiss.views.random_view import center_crop, normalize

RELATIVE = 1e-5
"""Of the features' norm: onnxruntime folds batch norms into convolutions and reorders sums, which is float32 rounding
(6e-8 per operation) over at most 53 layers; measured: 2e-7 to 2e-6."""


def images(count: int = 3, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def encoder_of(checkpoint: Checkpoint, name: EncoderName = "online") -> nn.Module:
    encoder: nn.Module = getattr(load_model(checkpoint, torch.device("cpu")), name)
    return encoder.eval()


@torch.no_grad()
def backbone_features(checkpoint: Checkpoint, batch: Tensor, name: EncoderName = "online") -> Tensor:
    features: Tensor = encoder_of(checkpoint, name).backbone(batch)  # type: ignore[operator]
    assert features.std() > 1e-3  # constant features would be equal too
    return features


def exported(checkpoint: Checkpoint, format: Format, out: Path, name: EncoderName = "online", **options: bool) -> Path:
    return export_encoder(load_encoder(checkpoint, name, **options), format, out)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_loads_the_export(checkpoint_of: MakeCheckpoint, tmp_path: Path, name: str) -> None:
    checkpoint = checkpoint_of(name)
    folder = exported(checkpoint, "torchvision", tmp_path / "export")
    net = torchvision.models.get_model(name, weights=None)
    net.fc = nn.Identity()
    net.load_state_dict(torch.load(folder / f"{name}.pth", weights_only=True), strict=True)
    with torch.no_grad():
        found = net.eval()(images())
    assert torch.equal(found, backbone_features(checkpoint, images()))  # the same operations in the same order


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timm_loads_the_export(checkpoint_of: MakeCheckpoint, tmp_path: Path, name: str) -> None:
    checkpoint = checkpoint_of(name, eval_resize=75)
    folder = exported(checkpoint, "timm", tmp_path / "export")
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        found = net(images())
    assert torch.equal(found, backbone_features(checkpoint, images()))
    config = timm.data.resolve_model_data_config(net)
    found_view = [tuple(config[name]) for name in ("input_size", "mean", "std")]
    assert found_view == [(3, 64, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]
    assert config["interpolation"] == "bilinear"
    resize = timm.data.create_transform(**config).transforms[0]
    assert resize.size == 75
    tuned = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    with torch.no_grad():
        assert tuned(images()).shape == (3, 7)
        assert torch.equal(tuned.forward_head(tuned.forward_features(images()), pre_logits=True), found)


def test_onnxruntime_runs_the_export(
    checkpoint_of: MakeCheckpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of("resnet18")
    folder = exported(checkpoint, "onnx", tmp_path / "export", "target")
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.onnx", "msf-faiss.json"]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        expected = backbone_features(checkpoint, images(count), "target").numpy()
        (found,) = session.run(["features"], {"images": images(count).numpy()})
        assert np.linalg.norm(found - expected) <= RELATIVE * np.linalg.norm(expected)
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    (opset,) = model.opset_import
    assert (opset.domain, opset.version) == ("", 18)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["encoder"] == "target"
    assert '"mean": [0.485, 0.456, 0.406]' in about["input"]
    content = (folder / "model.onnx").read_bytes()
    assert not re.search(rb"[\w/]{4}\.py", content)  # the exporter's stack traces contain paths of this machine


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("backbone", [NARROW, CIFAR, "resnet18"], ids=["narrow", "cifar", "imagenet"])
def test_load_export_rebuilds_the_network(
    checkpoint_of: MakeCheckpoint, tmp_path: Path, backbone: Any, projector: bool
) -> None:
    checkpoint = checkpoint_of(backbone, size=32, eval_resize=41)
    folder = exported(checkpoint, "safetensors", tmp_path / "export", projector=projector)
    before = torch.get_rng_state()
    net = load_export(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.training
    encoder = encoder_of(checkpoint)
    with torch.no_grad():
        expected = (encoder if projector else encoder.backbone)(images(2, 32))  # type: ignore[operator]
        assert torch.equal(net(images(2, 32)), expected)
        assert torch.equal(load_export(folder / "model.safetensors")(images(2, 32)), expected)
    assert all(tensor.device.type == "cpu" for tensor in net.state_dict().values())


def test_target_encoder_is_exported(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(NARROW)
    target = load_export(exported(checkpoint, "safetensors", tmp_path / "target", "target"))
    with torch.no_grad():
        assert torch.equal(target(images()), backbone_features(checkpoint, images(), "target"))
        assert not torch.equal(target(images()), backbone_features(checkpoint, images(), "online"))


def test_same_weights_give_the_same_bytes(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    for format, name in (
        ("torchvision", "resnet18.pth"),
        ("timm", "model.safetensors"),
        ("safetensors", "model.safetensors"),
    ):
        one, two = (exported(checkpoint_of("resnet18"), format, tmp_path / f"{format}{i}") for i in range(2))  # type: ignore[arg-type]
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize(
    ("format", "backbone", "projector"),
    [
        ("torchvision", "resnet18", False),
        ("torchvision", CIFAR, False),
        ("timm", "resnet18", False),
        ("safetensors", "resnet18", True),
        ("safetensors", CIFAR, False),
        ("safetensors", NARROW, False),
        ("safetensors", NARROW, True),
        ("onnx", NARROW, True),
    ],
    ids=str,
)
def test_code_on_the_model_card_runs(
    checkpoint_of: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: Format,
    backbone: Any,
    projector: bool,
) -> None:
    """Unchanged, in the export's folder; it computes the features that the evaluations use."""
    checkpoint = checkpoint_of(backbone, size=32, eval_resize=41)
    folder = exported(checkpoint, format, tmp_path / "export", projector=projector)
    photo = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    monkeypatch.chdir(folder)
    (tmp_path / "photo.png").rename("photo.jpg")  # lossless, to compare features
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    views = checkpoint.config.views
    view = normalize(center_crop([torch.from_numpy(photo).permute(2, 0, 1).contiguous()], views), views)
    encoder = encoder_of(checkpoint)
    with torch.no_grad():
        expected = (encoder if projector else encoder.backbone)(view)  # type: ignore[operator]
    # torchvision divides by 255 and by the standard deviation in another order.
    torch.testing.assert_close(torch.as_tensor(names["features"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torchvision", "timm", "onnx", "safetensors"])
@pytest.mark.parametrize("name", ["resnet34", "resnet152", "resnext50_32x4d", "wide_resnet50_2"])
def test_other_resnets(checkpoint_of: MakeCheckpoint, tmp_path: Path, name: str, format: Format) -> None:
    checkpoint = checkpoint_of(name)
    folder = exported(checkpoint, format, tmp_path / "export")
    expected = backbone_features(checkpoint, images(2))
    if format == "onnx":
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"images": images(2).numpy()})[0])
    else:
        net = load_export(folder) if format == "safetensors" else None
        if format == "timm":
            net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        if net is None:
            net = torchvision.models.get_model(name, weights=None)
            net.fc = nn.Identity()
            net.load_state_dict(torch.load(folder / f"{name}.pth", weights_only=True), strict=True)
        with torch.no_grad():
            found = net.eval()(images(2))
    assert (found - expected).norm() <= RELATIVE * expected.norm()


def test_load_export_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_export(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_export(file)
    safetensors.torch.save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="does not describe its network"):
        load_export(file)


def test_load_export_refuses_missing_weights(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    file = exported(checkpoint_of(NARROW), "safetensors", tmp_path / "export") / "model.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    del tensors["stem.0.weight"]
    safetensors.torch.save_file(tensors, file, metadata)
    with pytest.raises(UserError, match=r"do not fit the network.*stem\.0\.weight"):
        load_export(file)
