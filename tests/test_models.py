import subprocess
import sys

import pytest
import torch
import torchvision

from msf_faiss.config import ModelConfig, NarrowBackbone, TorchvisionBackbone
from msf_faiss.errors import UserError
from msf_faiss.models import build_backbone, build_model, compile_model


def test_config_accepts_every_torchvision_resnet() -> None:
    allowed = TorchvisionBackbone.model_fields["name"].annotation.__args__
    assert sorted(allowed) == sorted(n for n in torchvision.models.list_models(torchvision.models) if "resne" in n)


def test_resnet50_heads_have_the_sizes_of_the_paper() -> None:
    """ResNet-50: 2048 -> 4096 -> 512, and 512 -> 4096 -> 512 (paper, section 4)."""
    model = build_model(ModelConfig(), seed=0)
    shapes = [
        tuple(layer.weight.shape) for layer in (*model.online.projector, *model.predictor) if hasattr(layer, "weight")
    ]
    assert shapes == [(4096, 2048), (4096,), (512, 4096), (4096, 512), (4096,), (512, 4096)]
    assert sum(p.numel() for p in model.online.backbone.parameters()) == 23_508_032  # ResNet-50 without its classifier


@pytest.mark.parametrize(
    ("backbone", "features"),
    [
        (NarrowBackbone(), 128),
        (NarrowBackbone(width=16, depths=(2, 2, 2, 2), strides=(1, 2, 2, 2)), 128),
        (NarrowBackbone(width=5, depths=(1,), strides=(1,)), 5),
        (TorchvisionBackbone(name="resnet18", stem="cifar"), 512),
        (TorchvisionBackbone(name="resnet18"), 512),
    ],
)
def test_build_backbone_returns_the_feature_dim(backbone: NarrowBackbone | TorchvisionBackbone, features: int) -> None:
    net, feature_dim = build_backbone(backbone)
    assert feature_dim == features
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, features)


def test_cifar_stem_keeps_the_resolution() -> None:
    net, _ = build_backbone(TorchvisionBackbone(name="resnet18", stem="cifar"))
    images = torch.zeros(1, 3, 32, 32)
    assert net.maxpool(net.conv1(images)).shape == (1, 64, 32, 32)
    net, _ = build_backbone(TorchvisionBackbone(name="resnet18"))
    assert net.maxpool(net.conv1(images)).shape == (1, 64, 8, 8)


def test_seed_alone_determines_the_weights() -> None:
    config = ModelConfig(backbone=NarrowBackbone())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(config, seed=5).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = build_model(config, seed=5).state_dict(), build_model(config, seed=6).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["online.backbone.stem.0.weight"], other["online.backbone.stem.0.weight"])


def test_without_predictor_queries_are_embeddings() -> None:
    model = build_model(ModelConfig(backbone=NarrowBackbone(), predictor=False), seed=0)
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(images), model.embed_target(images))  # the target still equals the online encoder
    assert not [name for name in model.state_dict() if "predictor" in name]


def test_online_and_target_start_equal() -> None:
    model = build_model(ModelConfig(backbone=NarrowBackbone()), seed=0)
    online, target = model.online.state_dict(), model.target.state_dict()
    assert online.keys() == target.keys()
    assert all(torch.equal(online[name], target[name]) for name in online)
    model.embed_target(torch.randn(4, 3, 32, 32))
    assert torch.linalg.vector_norm(model(torch.randn(4, 3, 32, 32)), dim=1).sub(1).abs().max() < 1e-6


@pytest.mark.parametrize("width", [4, 16])
def test_narrow_resnet_trains_on_large_views(width: int) -> None:
    """In a process of its own: the wrong memory format would corrupt its memory."""
    code = f"""
import torch
from msf_faiss.config import Config, ModelConfig, NarrowBackbone
from msf_faiss.models import best_memory_format
from msf_faiss.train.state import TrainState
from msf_faiss.train.step import train_step
state = TrainState.create(Config(model=ModelConfig(backbone=NarrowBackbone(width={width}))), torch.device("cpu"))
views = torch.randn(4, 3, 128, 128).contiguous(memory_format=best_memory_format(state.model, torch.device("cpu")))
for _ in range(3):
    train_step(state, views, views, torch.arange(4), k=2, learning_rate=0.1, momentum=0.9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_compile_on_the_cpu_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"on the CPU it needs a C\+\+ compiler.*train.compile=false"):
        compile_model(build_model(ModelConfig(backbone=NarrowBackbone()), seed=0))


@pytest.mark.slow  # a minute of compiling
def test_compiled_model_gives_the_same_embeddings_and_names() -> None:
    config = ModelConfig(backbone=NarrowBackbone(width=4, depths=(1,), strides=(2,)), dim=8)
    plain, compiled = build_model(config, seed=0), build_model(config, seed=0)
    compile_model(compiled)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    # Sums in batch norms and convolutions may be taken in another order.
    torch.testing.assert_close(compiled(images), plain(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.embed_target(images), plain.embed_target(images), rtol=1e-4, atol=1e-5)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(("width", "dim", "expected"), [(4, None, 64), (272, None, 68), (4, 3, 3)])
def test_default_dimension_of_embeddings_has_a_floor(width: int, dim: int | None, expected: int) -> None:
    config = ModelConfig(backbone=NarrowBackbone(width=width, depths=(1,), strides=(2,)), dim=dim)
    assert build_model(config, seed=0).online.dim == expected
