"""Files of weights as other projects write them: read, or refused in words that help."""

import argparse
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from msf_faiss.config.load import load_config
from msf_faiss.errors import UserError
from msf_faiss.evaluate.results import EvalEncoder
from msf_faiss.evaluate.weights import open_weights
from msf_faiss.models import build_model

TINY = ["model.backbone.kind=narrow", "model.backbone.width=4"]
State = dict[str, Tensor]


def backbone(seed: int) -> nn.Module:
    network = build_model(load_config("demo", TINY).model, seed=seed).online.backbone
    with torch.no_grad():
        for _ in range(2):
            network(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))  # moves batch statistics
    return network.eval()


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def without_counters(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def numbered(state: State) -> State:
    """As in `nn.Sequential(*network.children())`."""
    order = [name for name, _ in backbone(1).named_children()]
    return {f"{order.index(name.partition('.')[0])}.{name.partition('.')[2]}": state[name] for name in state}


HEAD = {"fc.0.weight": torch.zeros(3, 3), "fc.2.bias": torch.zeros(3)}
FORMS: dict[str, tuple[Callable[[State, State], Any], tuple[EvalEncoder, ...]]] = {
    "MoCo": (
        lambda one, two: {
            "epoch": 200,
            "arch": "resnet50",
            "state_dict": under("module.encoder_q.", one | HEAD)
            | under("module.encoder_k.", two | HEAD)
            | {"module.queue": torch.zeros(2, 3), "module.queue_ptr": torch.zeros(1)},
            "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        },
        ("online", "target"),
    ),
    "MoCo v3": (
        lambda one, two: {
            "state_dict": under("module.base_encoder.", one)
            | under("module.momentum_encoder.", two)
            | under("module.predictor.", HEAD)
        },
        ("online", "target"),
    ),
    "DINO": (
        lambda one, two: {
            "student": under("module.backbone.", one) | {"module.head.mlp.0.weight": torch.zeros(2)},
            "teacher": under("backbone.", two) | {"head.mlp.0.weight": torch.zeros(2)},
            "optimizer": {"state": {}},
            "epoch": 3,
            "args": argparse.Namespace(arch="vit_small"),
            "dino_loss": {"center": torch.zeros(1, 4)},
        },
        ("target", "online"),
    ),
    "BYOL": (lambda one, two: under("online_network.", one) | under("target_network.", two), ("online", "target")),
    "SimSiam": (
        lambda one, two: {"state_dict": under("module.encoder.", one | HEAD) | under("module.predictor.", HEAD)},
        ("weights",),
    ),
    "Lightning": (
        lambda one, two: {"state_dict": under("model.backbone.", one), "hparams_name": "kwargs", "global_step": 7},
        ("weights",),
    ),
    "SwAV": (lambda one, two: under("module.", one | {"prototypes.weight": torch.zeros(2, 3)}), ("weights",)),
    "compiled": (lambda one, two: {"model": under("_orig_mod.", one), "best_acc1": np.float64(71.5)}, ("weights",)),
    "without num_batches_tracked": (lambda one, two: without_counters(one), ("weights",)),
    "nested": (lambda one, two: {"classy": {"base_model": {"model": {"trunk": one}}}}, ("weights",)),
    "numbered": (lambda one, two: {"state_dict": under("backbone.", numbered(one))}, ("weights",)),
    "half": (lambda one, two: {name: tensor.half() for name, tensor in one.items()}, ("weights",)),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_projects_weights_load_exactly(tmp_path: Path, form: str) -> None:
    wrap, encoders = FORMS[form]
    networks = {"online": backbone(1), "target": backbone(2)}
    torch.save(wrap(*(dict(network.state_dict()) for network in networks.values())), tmp_path / "a.pth")
    weights = open_weights(tmp_path / "a.pth", TINY, base="demo")
    assert weights.trained == encoders
    views = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in encoders:
            expected = networks["online" if name == "weights" else name](views)
            found = weights.backbone(name).eval()(views)
            assert torch.allclose(found, expected, rtol=0.02, atol=0.02) if form == "half" else found.equal(expected)


def test_checkpoint_of_cmsf(tmp_path: Path) -> None:
    model = build_model(load_config("demo", TINY).model, seed=3)
    parts = {"online": "encoder_q", "target": "encoder_t", "predictor": "predict_q"}
    state = {"pool": torch.zeros(2, 9, 4), "pool_qindex": torch.zeros(9), "index_queue": torch.zeros(9)}
    state |= {"queue": torch.zeros(9, 4), "labels": torch.zeros(9), "queue_ptr": torch.zeros(1)}
    for name, tensor in without_counters(model.state_dict()).items():
        part, _, rest = name.partition(".")
        state[f"{parts[part]}.module.{rest.replace('backbone.', '').replace('projector.', 'fc.')}"] = tensor
    torch.save({"state_dict": state, "epoch": 200}, tmp_path / "a.pth")
    weights = open_weights(tmp_path / "a.pth", TINY, base="demo")
    assert weights.form == "MSF authors' checkpoint"
    found = weights.backbone("online").state_dict()
    assert all(tensor.equal(model.online.backbone.state_dict()[name]) for name, tensor in found.items())


def change(state: State, name: str, value: Tensor | None) -> State:
    return {own: tensor for own, tensor in state.items() if own != name} | ({} if value is None else {name: value})


MISFITS: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (lambda one: under("encoder_q.", change(one, "stem.0.weight", None)), r"missing: encoder_q\.stem\.0\.w"),
    "surplus": (
        lambda one: under("net.", one | {"stem.9.weight": torch.zeros(1)}),
        r"unexpected: net\.stem\.9\.weight",
    ),
    "unknown part": (lambda one: one | {"extra.weight": torch.zeros(1)}, r"unexpected: extra\.weight"),
    "shape": (lambda one: change(one, "stem.0.weight", torch.zeros(4, 1, 3, 3)), r"another shape: stem\.0\.weight"),
    "sparse": (lambda one: change(one, "stem.0.weight", torch.zeros(4, 3, 3, 3).to_sparse()), "another shape: stem"),
    "complex": (lambda one: change(one, "stem.0.weight", torch.zeros(4, 3, 3, 3) * 1j), "another shape: stem"),
    "another network": (
        lambda one: {"a.b": torch.zeros(2), "c": torch.zeros(1)},
        "none of them. Names .* begin with a, c",
    ),
    "twice": (lambda one: under("a.", one) | under("b.", one), r"several times, under 'a\.', 'b\.'; save"),
    "numbers as names": (lambda one: {0: torch.zeros(2)}, "expected a state dict, but 0 is not a name"),
    "transformer": (
        lambda one: {"backbone.patch_embed.proj.weight": torch.zeros(384, 3, 16, 16)},
        "add --arch timm:vit_small_patch16_224",
    ),
}


@pytest.mark.parametrize("form", MISFITS)
def test_weights_that_do_not_fit_say_what_would_help(tmp_path: Path, form: str) -> None:
    make, complaint = MISFITS[form]
    torch.save(make(dict(backbone(1).state_dict())), tmp_path / "a.pth")
    with pytest.raises(UserError, match=complaint) as caught:
        open_weights(tmp_path / "a.pth", TINY, base="demo").backbone("weights")
    assert str(tmp_path / "a.pth") in str(caught.value)


def test_weights_of_a_known_network_name_it(tmp_path: Path) -> None:
    network = torchvision.models.resnet18(weights=None)
    torch.save(under("module.encoder_q.", dict(network.state_dict())), tmp_path / "a.pth")
    with pytest.raises(UserError, match="They look like those of resnet18: add --arch resnet18"):
        open_weights(tmp_path / "a.pth", TINY, base="demo")


@pytest.mark.parametrize(
    ("ending", "content", "complaint"),
    [
        (
            ".pth",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 94\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (".safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (".pth", b"\n<!DOCTYPE html><html>Not found</html>", "web page"),
        (".bin", b"<html>", "web page"),
        (".pth.gz", gzip.compress(b"weights"), "gzip"),
        (".h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
    ],
)
def test_what_is_no_weights_says_what_it_is(tmp_path: Path, ending: str, content: bytes, complaint: str) -> None:
    (tmp_path / f"a{ending}").write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        open_weights(tmp_path / f"a{ending}", TINY, base="demo")
    assert "execute code" not in str(caught.value)


def test_the_ending_of_a_file_does_not_matter(tmp_path: Path) -> None:
    state = dict(backbone(1).state_dict())
    safetensors.torch.save_file(state, tmp_path / "a.bin")
    torch.save(state, tmp_path / "a.safetensors")
    for name in ("a.bin", "a.safetensors"):
        assert open_weights(tmp_path / name, TINY, base="demo").trained == ("weights",)


@pytest.mark.parametrize(
    ("value", "complaint"), [(torch.nan, "not finite"), (torch.inf, "not finite"), (-1.0, "negative")]
)
@pytest.mark.parametrize("authors", [False, True])
def test_impossible_values_are_said_to_be_in_the_file(
    tmp_path: Path, value: float, complaint: str, authors: bool
) -> None:
    model = build_model(load_config("demo", TINY).model, seed=3)
    with torch.no_grad():
        model.online.backbone.stem[1].running_var[2] = value  # type: ignore[index, union-attr, operator]
    parts = {"online": "encoder_q", "target": "encoder_t", "predictor": "predict_q"}
    state: State = {}
    for name, tensor in model.state_dict().items() if authors else model.online.backbone.state_dict().items():
        part, _, rest = name.partition(".")
        state[f"{parts[part]}.{rest.replace('backbone.', '').replace('projector.', 'fc.')}" if authors else name] = (
            tensor
        )
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=rf"a\.pth: .*stem\.1\.running_var.*{complaint}|a\.pth: .*{complaint}.*file"
    ) as caught:
        open_weights(tmp_path / "a.pth", TINY, base="demo").backbone("online" if authors else "weights")
    assert "lower" not in str(caught.value)


def test_views_follow_the_data_config_of_timm(tmp_path: Path) -> None:
    arch = "timm:vit_tiny_patch16_224"  # ImageNet's mean is not this network's
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "a.pth")
    weights = open_weights(tmp_path / "a.pth", ["data.path=x"], base="imagenet", arch=arch)
    views, known = weights.config.views, timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert (views.mean, views.std, views.resize) == (known.mean, known.std, int(224 / known.crop_pct))
    assert views.mean == (0.5, 0.5, 0.5)
    assert any("views.mean" in note for note in weights.notes)
    assert any("bicubic" in note for note in weights.notes)
    given = ["data.path=x", "views.mean=[0.1, 0.2, 0.3]", "views.eval_resize=224"]
    weights = open_weights(tmp_path / "a.pth", given, base="imagenet", arch=arch)
    assert (weights.config.views.mean, weights.config.views.resize) == ((0.1, 0.2, 0.3), 224)
    assert weights.config.views.std == (0.5, 0.5, 0.5)
