"""Weights of other code load exactly, or not at all."""

import argparse
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from untrained import save_untrained

from msf_faiss.config.load import load_config
from msf_faiss.embeddings.encoder import load_encoder
from msf_faiss.errors import UserError
from msf_faiss.evaluate.results import EvalEncoder
from msf_faiss.evaluate.weights import Weights, open_weights
from msf_faiss.models import MeanShift, build_model

SMALL = ["views.size=32", "model.backbone.kind=torchvision", "model.backbone.name=resnet18"]
TINY = ["model.backbone.kind=narrow", "model.backbone.width=4"]


@pytest.fixture(scope="module")
def views() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def change_statistics(model: nn.Module) -> None:
    """Give batch norms other statistics than a new network has."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean += torch.linspace(-0.1, 0.1, len(module.running_mean))  # type: ignore[arg-type, operator]
                module.running_var *= 1.5  # type: ignore[operator]


def authors(model: MeanShift, form: str) -> dict[str, Tensor]:
    """A state dict as saved by train_msf.py, with one DataParallel per encoder ("each") or around all."""
    names = {"online.": "encoder_q.", "target.": "encoder_t.", "predictor.": "predict_q."}
    state = {}
    for name, tensor in model.state_dict().items():
        ours = next(prefix for prefix in names if name.startswith(prefix))
        rest = name.removeprefix(ours).replace("backbone.", "").replace("projector.", "fc.")
        inside = "module." if form == "each" else ""
        outside = "module." if form == "all" else ""
        state[f"{outside}{names[ours]}{inside}{rest}"] = tensor
    outside = "module." if form == "all" else ""
    return state | {
        f"{outside}queue": torch.randn(12, 8),
        f"{outside}labels": torch.zeros(12, dtype=torch.int64),
        f"{outside}queue_ptr": torch.zeros(1, dtype=torch.int64),
    }


def save(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    content = {"opt": argparse.Namespace(arch="resnet18", topk=5), "state_dict": state, "optimizer": {"state": {}}}
    torch.save(content | {"epoch": 200} | more, path)
    return path


def features(weights: Weights, name: EvalEncoder, views: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = weights.backbone(name).eval()(views)
    return output


@pytest.mark.parametrize("form", ["each", "all"])
def test_authors_checkpoint(tmp_path: Path, views: Tensor, form: str) -> None:
    config = load_config("demo", TINY)
    model = build_model(config.model, seed=3)
    change_statistics(model)
    with torch.no_grad():
        model.target.backbone.stem[0].weight.mul_(1.25)  # type: ignore[index, union-attr, operator]
    path = save(tmp_path / "ckpt_epoch_200.pth", authors(model, form))
    weights = open_weights(path, TINY, base="demo")
    assert (weights.trained, weights.epoch, weights.step, weights.run_dir) == (("online", "target"), 200.0, None, None)
    with torch.no_grad():
        for name, encoder in (("online", model.online), ("target", model.target)):
            assert torch.equal(features(weights, name, views), encoder.backbone.eval()(views))  # type: ignore[arg-type]
    fresh = build_model(config.model, seed=config.seed).online.backbone.eval()
    with torch.no_grad():
        assert torch.equal(features(weights, "untrained", views), fresh(views))
    with pytest.raises(UserError, match="has no encoder 'weights', only online and target"):
        weights.backbone("weights")


def test_missing_unexpected_and_reshaped_weights_are_errors(tmp_path: Path) -> None:
    model = build_model(load_config("demo", TINY).model, seed=0)
    whole = authors(model, "each")
    bank = {"queue", "labels", "queue_ptr"}
    ours = [name for name in whole if name not in bank and not name.endswith("num_batches_tracked")]
    for name in ours[::9]:
        path = save(tmp_path / "less.pth", {key: value for key, value in whole.items() if key != name})
        with pytest.raises(UserError, match=r"do not fit the network .*missing: "):
            open_weights(path, TINY, base="demo").backbone("online")
    path = save(tmp_path / "more.pth", whole | {"encoder_q.module.extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"unexpected: online\.backbone\.extra"):
        open_weights(path, TINY, base="demo").backbone("online")
    path = save(tmp_path / "momentum.pth", whole | {"encoder_k.conv1.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"unexpected weight 'encoder_k\.conv1\.weight'"):
        open_weights(path, TINY, base="demo").backbone("online")
    with pytest.raises(UserError, match="of another shape"):
        open_weights(save(tmp_path / "w.pth", whole), [*TINY[:1], "model.backbone.width=8"], base="demo").backbone(
            "online"
        )
    assert bank <= set(whole)  # of which none is needed
    path = save(tmp_path / "bankless.pth", {key: whole[key] for key in ours})
    open_weights(path, TINY, base="demo").backbone("target")


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "timm:resnet18"])
def test_state_dicts_of_torchvision_and_timm(tmp_path: Path, views: Tensor, arch: str, ending: str) -> None:
    torch.manual_seed(5)
    name = arch.removeprefix("timm:")
    net = timm.create_model(name) if ":" in arch else torchvision.models.get_model(name, weights=None)
    change_statistics(net)
    path = tmp_path / f"net{ending}"
    if ending == ".pth":
        torch.save(net.state_dict(), path)
    else:
        safetensors.torch.save_file(net.state_dict(), path)
    weights = open_weights(path, ["views.size=32"], base="demo", arch=arch)
    assert weights.trained == ("weights",)
    if ":" in arch:
        net.reset_classifier(0)
    else:
        setattr(net, "fc" if name == "resnet18" else "classifier", nn.Identity())
    with torch.no_grad():
        assert torch.equal(features(weights, "weights", views), net.eval()(views))
    assert not torch.equal(features(weights, "untrained", views), features(weights, "weights", views))
    assert torch.equal(features(weights, "untrained", views), features(weights, "untrained", views))


def test_state_dict_without_classifier(tmp_path: Path, views: Tensor) -> None:
    net = build_model(load_config("demo", SMALL).model, seed=4).online.backbone
    safetensors.torch.save_file(
        {f"module.{name}": value for name, value in net.state_dict().items()}, tmp_path / "a.safetensors"
    )
    weights = open_weights(tmp_path / "a.safetensors", SMALL, base="demo")
    with torch.no_grad():
        assert torch.equal(features(weights, "weights", views), net.eval()(views))
    weights = open_weights(tmp_path / "a.safetensors", ["views.size=32"], base="demo", arch="resnet18")
    assert weights.config.model.backbone.name == "resnet18"  # type: ignore[union-attr]
    with pytest.raises(UserError, match="do not fit the network"):
        open_weights(tmp_path / "a.safetensors", SMALL, base="demo", arch="resnet34").backbone("weights")


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("executed"),)


def test_files_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": Evil()}}, "evil.pth")
    Path("pickle.pkl").write_bytes(pickle.dumps({"a": Evil()}))
    Path("text.pth").write_text("no weights")
    Path("empty.pth").write_bytes(b"")
    Path("text.safetensors").write_text("no weights")
    torch.save([torch.zeros(2)], "list.pth")
    torch.save({}, "nothing.pth")
    torch.save({"state_dict": {"a": 3}}, "numbers.pth")
    for name, complaint in [
        ("evil.pth", "refused"),
        ("pickle.pkl", "refused"),
        ("text.pth", "refused"),
        ("empty.pth", "cannot be read as weights"),
        ("text.safetensors", "cannot be read as weights"),
        ("list.pth", "expected a state dict, found list"),
        ("nothing.pth", "expected a state dict, but it is empty"),
        ("numbers.pth", "'a' is not a tensor"),
    ]:
        with pytest.raises(UserError, match=complaint):
            open_weights(Path(name), base="demo")
    assert not Path("executed").exists()


def test_unknown_or_unfit_networks(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth")

    def load(arch: str, *overrides: str) -> None:
        open_weights(tmp_path / "a.pth", overrides, base="demo", arch=arch).backbone("untrained")

    with pytest.raises(UserError, match="torchvision has no such classification net"):
        load("resnet19")
    with pytest.raises(UserError, match="timm:no_such_net"):
        load("timm:no_such_net")
    with pytest.raises(UserError, match=r"does not accept views of 32 px .* set views\.size"):
        load("timm:vit_tiny_patch16_224", "views.size=32")
    with pytest.raises(UserError, match=r"is a file of weights, .* --config"):
        open_weights(tmp_path / "a.pth")


def test_checkpoint_is_read_once(tmp_path: Path, views: Tensor) -> None:
    """A run that is training deletes it before the evaluation ends."""
    saved = save_untrained(load_config("demo", TINY), tmp_path, images=4000)
    expected = load_encoder(saved).network(views)
    weights = open_weights(tmp_path)
    shutil.rmtree(saved)
    for name in ("target", "online"):
        network = weights.backbone(name).eval()
        change_statistics(network)  # of this copy only
    assert torch.equal(weights.backbone("online").eval()(views), expected)
