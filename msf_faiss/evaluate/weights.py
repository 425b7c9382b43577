"""Load backbones from checkpoints of msf-faiss, and from files of weights that other code wrote.

A file contains a state dict, or a dict with one under `state_dict` or `model`. Two naming schemes are supported:

- the MSF authors' (train_msf.py): `encoder_q.…`, `encoder_t.…` and `predict_q.…`, with `module.` anywhere in a name, as
  `DataParallel` adds it; the bank (`queue`, `labels`, `queue_ptr`) is ignored;
- torchvision's and timm's: the names of a classification network, with or without its classifier.

Every weight must match the network. Files of torch.save are read with `weights_only`, which executes no code in them.
"""

import argparse
import copy
import hashlib
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from msf_faiss.checkpoint.format import FOLDER, MANIFEST, find_checkpoint
from msf_faiss.checkpoint.load import load_model
from msf_faiss.config import Config, TorchvisionBackbone
from msf_faiss.config.load import load_config, override_config
from msf_faiss.device import CPU
from msf_faiss.embeddings.inputs import override_inputs
from msf_faiss.errors import UserError
from msf_faiss.evaluate.results import EvalEncoder
from msf_faiss.files import kind_of
from msf_faiss.models import build_model

_TIMM = "timm:"
"""Prefix of the name of a timm network."""

_CONFIGURABLE = get_args(TorchvisionBackbone.model_fields["name"].annotation)
_HEADS = ("fc", "classifier", "heads", "head")  # names of the classifier in torchvision's networks
_AUTHORS = {"encoder_q": "online", "encoder_t": "target", "predict_q": "predictor"}
_AUTHORS_BANK = {"queue", "labels", "queue_ptr"}
_SHOWN = 3  # weights that an error lists

_StateDict = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The encoders of one checkpoint or file."""

    path: Path
    run_dir: Path | None  # None: not part of a run
    form: str  # of the file, readable
    digest: str  # SHA-256 of the file
    step: int | None  # completed steps; None: unknown
    epoch: float | None
    config: Config  # with the overrides
    net: Mapping[str, Any]  # the network, for a protocol
    trained: tuple[EvalEncoder, ...]  # the encoders in the file, the one to evaluate by default first
    load: Callable[[EvalEncoder], nn.Module]  # backbone of one of `trained`, [B, 3, S, S] -> [B, F], on the CPU
    fresh: Callable[[], nn.Module]  # the untrained backbone

    def backbone(self, name: EvalEncoder) -> nn.Module:
        """Normalised views [B, 3, S, S] -> features [B, F], on the CPU.

        Raises:
            UserError: if there is no such encoder, or the weights are damaged or do not fit the network.
        """
        if name == "pixels":
            return nn.Flatten()
        if name == "untrained":
            return self.fresh()
        if name not in self.trained:
            raise UserError(f"{self.path} ({self.form}) has no encoder {name!r}, only {' and '.join(self.trained)}")
        return self.load(name)


def open_weights(
    path: Path, overrides: Sequence[str] = (), *, base: str | None = None, arch: str | None = None
) -> Weights:
    """Open the weights of a run's newest checkpoint, of a checkpoint, or in a file.

    Args:
        path: run directory, checkpoint directory, or file (.safetensors, or written by torch.save).
        overrides: `KEY=VALUE` changes to the config; of a checkpoint, see `inputs.override_inputs`.
        base: for a file: config (a shipped name or a YAML file) that gives data and views, and the network if `arch` is
            None.
        arch: for a file: name of a torchvision network, or "timm:NAME".

    Raises:
        UserError: if there are no weights at `path`, or the other arguments do not fit them.
    """
    if kind_of(path) != "file" or path.name == MANIFEST:
        if base is not None or arch is not None:
            raise UserError(f"{path}: a checkpoint has its own config and network; leave out --config and --arch")
        return _open_checkpoint(path, overrides)
    if base is None:
        raise UserError(
            f"{path} is a file of weights, which does not say what data and views to use; add --config NAME or "
            "FILE.yaml, and --arch NAME if the config has another network. (A checkpoint of msf-faiss is a directory.)"
        )
    return _open_file(path, load_config(base, overrides), arch)


def run_of(path: Path) -> Path | None:
    """The run directory of `path`, a run or checkpoint directory or a manifest; None if there is none."""
    folder = path.parent if path.name == MANIFEST else path
    if kind_of(folder / FOLDER) == "folder":
        return folder
    return folder.parent.parent if kind_of(folder) == "folder" and folder.parent.name == FOLDER else None


def _open_checkpoint(path: Path, overrides: Sequence[str]) -> Weights:
    checkpoint = find_checkpoint(path)
    model = load_model(checkpoint, CPU)  # once, since a run that is training deletes its older checkpoints
    return Weights(
        path=checkpoint.path,
        run_dir=checkpoint.run_dir,
        form="msf-faiss",
        digest=checkpoint.files["model.safetensors"],
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        config=override_inputs(checkpoint.config, overrides),
        net=checkpoint.config.model.model_dump(mode="json"),
        trained=("online", "target"),
        load=lambda name: copy.deepcopy((model.online if name == "online" else model.target).backbone),
        fresh=lambda: build_model(checkpoint.config.model, seed=checkpoint.config.seed).online.backbone,
    )


def _open_file(path: Path, config: Config, arch: str | None) -> Weights:
    content = _read(path)
    state = _state_dict(path, content)
    epoch = content.get("epoch")
    if arch in _CONFIGURABLE:
        config = override_config(config, ["model.backbone.kind=torchvision", f"model.backbone.name={arch}"])
        arch = None
    by_authors = any(name.partition(".")[0] in _AUTHORS for name in state)
    if by_authors and arch is not None:
        raise UserError(
            f"{path} is a checkpoint of the MSF authors' code; --arch must be one of {', '.join(_CONFIGURABLE)}"
        )
    if by_authors:
        form, load = "MSF authors' checkpoint", _authors_loader(path, state, config)
    else:
        form, load = "state dict", _plain_loader(path, state, config, arch)
    trained: tuple[EvalEncoder, ...] = ("online", "target") if by_authors else ("weights",)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Weights(
        path=path,
        run_dir=None,
        form=form,
        digest=digest,
        step=None,
        epoch=float(epoch) if isinstance(epoch, int) else None,
        config=config,
        net=config.model.backbone.model_dump(mode="json") if arch is None else {"arch": arch},
        trained=trained,
        load=load,
        fresh=lambda: _build_network(config, arch)[0],
    )


def _authors_loader(path: Path, state: _StateDict, config: Config) -> Callable[[EvalEncoder], nn.Module]:
    """Backbones with the authors' names, loaded as part of our whole model so that the heads are checked too."""
    renamed: _StateDict = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part in _AUTHORS:
            if part != "predict_q":
                inner = "projector" if rest.startswith("fc.") else "backbone"
                rest = f"{inner}.{rest.removeprefix('fc.')}"
            renamed[f"{_AUTHORS[part]}.{rest}"] = tensor
        elif name not in _AUTHORS_BANK:
            raise UserError(f"{path}: unexpected weight {name!r} in a checkpoint of the MSF authors' code")

    def load(name: EvalEncoder) -> nn.Module:
        model = build_model(config.model, seed=0)
        _load_strictly(model, renamed, path, "the MSF authors' names, converted to ours")
        return model.online.backbone if name == "online" else model.target.backbone

    return load


def _plain_loader(
    path: Path, state: _StateDict, config: Config, arch: str | None
) -> Callable[[EvalEncoder], nn.Module]:
    """A backbone with its own names; weights of a classifier are ignored."""

    def load(name: EvalEncoder) -> nn.Module:
        network, heads = _build_network(config, arch)
        backbone = {key: tensor for key, tensor in state.items() if not key.startswith(heads)}
        _load_strictly(network, backbone, path, arch or config.model.backbone.kind)
        return network

    return load


def _build_network(config: Config, arch: str | None) -> tuple[nn.Module, tuple[str, ...]]:
    """A backbone initialised with the config's seed, and the prefixes of its classifier's weights.

    Raises:
        UserError: if there is no such network, or it does not accept views of the config's size.
    """
    if arch is None:
        return build_model(config.model, seed=config.seed).online.backbone, ("fc.",)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network, heads = _timm(arch.removeprefix(_TIMM)) if arch.startswith(_TIMM) else _torchvision(arch)
    size = config.views.size
    try:
        with torch.no_grad():
            features = network.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"--arch {arch} does not accept views of {size} px ({error}); set views.size") from error
    if features.ndim != 2:
        raise UserError(f"--arch {arch} gives an output of shape {list(features.shape)}; features must be [1, F]")
    return network, heads


def _torchvision(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    if name not in torchvision.models.list_models(torchvision.models):
        raise UserError(
            f"--arch {name}: torchvision has no such classification network; for a network of timm, write {_TIMM}NAME"
        )
    network = torchvision.models.get_model(name, weights=None)
    head = next(head for head in _HEADS if hasattr(network, head))
    setattr(network, head, nn.Identity())
    return network, (f"{head}.",)


def _timm(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"--arch {_TIMM}{name} needs the package timm: pip install 'msf-faiss[timm]'") from error
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise UserError(f"--arch {_TIMM}{name}: {error}; `timm.list_models()` lists the names") from error
    heads = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    return network, tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))


def _read(path: Path) -> dict[str, Any]:
    """Read a file of weights without executing code in it."""
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        # The authors' checkpoints contain their options. torch warns about files that it then rejects, or reads.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, because it contains more than tensors, which could execute code, or was not written by "
            "torch.save; save only its state dict, e.g. as .safetensors"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read as weights ({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a state dict, found {type(content).__name__}")
    return content


def _state_dict(path: Path, content: Mapping[str, Any]) -> _StateDict:
    """The state dict in a file's content, without the `module` of DataParallel in its names."""
    state = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), content)
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if not state or others:
        problem = f"{others[0]!r} is not a tensor" if others else "it is empty"
        raise UserError(f"{path}: expected a state dict, but {problem}")
    return {".".join(part for part in name.split(".") if part != "module"): value for name, value in state.items()}


def _load_strictly(network: nn.Module, state: _StateDict, path: Path, what: str) -> None:
    """Load every weight; a missing or unexpected one, or one of another shape, is an error."""
    expected = network.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    reshaped = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    problems = [
        f"{problem} {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
        for problem, names in (("missing:", missing), ("unexpected:", unexpected), ("of another shape:", reshaped))
        if names
    ]
    if problems:
        raise UserError(
            f"{path}: the weights do not fit the network ({what}): {'; '.join(problems)}. Name their network with "
            "--arch or --set model.backbone.…"
        )
    network.load_state_dict(state, strict=True)
