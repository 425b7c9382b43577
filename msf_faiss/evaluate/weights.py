"""Where encoders come from: our checkpoints, and files that others wrote. All weights are taken, or there is an error.

A file holds a state dict, or a dict that has one under `state_dict` or `model`. Three forms are known:

- the MSF authors' (train_msf.py): `encoder_q.…`, `encoder_t.…` and `predict_q.…`, with `module.` anywhere in a name as
  `DataParallel` leaves it; the bank (`queue`, `labels`, `queue_ptr`) is not looked at;
- torchvision's and timm's: a classification net's own names, its classifier included or not.

Files of torch.save are read with `weights_only`, so that nothing in them is executed.
"""

from __future__ import annotations

import argparse
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
from msf_faiss.config import Config, TorchvisionBackbone
from msf_faiss.config.load import load_config, override_config
from msf_faiss.embeddings.encoder import load_encoder
from msf_faiss.embeddings.inputs import override_inputs
from msf_faiss.errors import UserError
from msf_faiss.evaluate.results import EncoderName
from msf_faiss.models import build_model

TIMM = "timm:"
"""Before the name of a timm net."""

_OURS = get_args(TorchvisionBackbone.model_fields["name"].annotation)
_HEADS = ("fc", "classifier", "heads", "head")  # what torchvision's nets call their classifier
_AUTHORS = {"encoder_q": "online", "encoder_t": "target", "predict_q": "predictor"}
_AUTHORS_BANK = {"queue", "labels", "queue_ptr"}
_NAMED = 3  # weights that an error lists

StateDict = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The encoders of one checkpoint or file."""

    path: Path
    run_dir: Path | None  # None: they belong to no run
    form: str  # for people: whose format it is
    digest: str  # SHA-256 of the file that holds them
    step: int | None  # finished steps; None: not known
    epoch: float | None
    config: Config  # with the overrides
    net: Mapping[str, Any]  # the network, for a protocol
    trained: tuple[EncoderName, ...]  # those that it holds, the one to evaluate first
    load: Callable[[EncoderName], nn.Module]  # one of `trained`: backbone, [B, 3, S, S] -> [B, F], on the CPU
    fresh: Callable[[], nn.Module]  # the same network as it was before the first step

    def backbone(self, name: EncoderName) -> nn.Module:
        """[B, 3, S, S] normalised views -> [B, F], on the CPU.

        Raises:
            UserError: if there is no such encoder, the weights are damaged, or do not fit the network one by one.
        """
        if name == "pixels":
            return nn.Flatten()
        if name == "untrained":
            return self.fresh()
        if name not in self.trained:
            raise UserError(f"{self.path} ({self.form}) holds no encoder {name!r}; it has {' and '.join(self.trained)}")
        return self.load(name)


def open_weights(
    path: Path, overrides: Sequence[str] = (), *, base: str | None = None, arch: str | None = None
) -> Weights:
    """The weights of a run's newest checkpoint, of a checkpoint, or in a file.

    Args:
        path: run or checkpoint directory, or a file: .safetensors, or what torch.save wrote.
        overrides: `key=value`, changes to the config: of a checkpoint `data.…`, `views.…` and `train.threads` alone.
        base: for a file: the config (a shipped name or a YAML file) that gives data and views, and the network too
            where `arch` is None.
        arch: for a file: a net of torchvision, or of timm as "timm:NAME".

    Raises:
        UserError: if there is nothing of the kind at `path`, or the other arguments do not fit it.
    """
    if not path.is_file() or path.name == MANIFEST:
        if base is not None or arch is not None:
            raise UserError(f"{path}: a checkpoint brings its own config and network; leave out --config and --arch")
        return _of_checkpoint(path, overrides)
    if base is None:
        raise UserError(
            f"{path} is a file, not a checkpoint of msf-faiss, which is a directory. To evaluate the weights in it, say"
            " what data and views to use: --config NAME or FILE.yaml, and --arch NAME if the network is another"
        )
    return _of_file(path, load_config(base, overrides), arch)


def run_of(path: Path) -> Path | None:
    """The run that `path`, a run or checkpoint directory or its manifest, belongs to; None if it belongs to none."""
    folder = path.parent if path.name == MANIFEST else path
    if (folder / FOLDER).is_dir():
        return folder
    return folder.parent.parent if folder.is_dir() and folder.parent.name == FOLDER else None


def _of_checkpoint(path: Path, overrides: Sequence[str]) -> Weights:
    checkpoint = find_checkpoint(path)
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
        load=lambda name: load_encoder(checkpoint, "online" if name == "online" else "target").network,
        fresh=lambda: build_model(checkpoint.config.model, seed=checkpoint.config.seed).online.backbone,
    )


def _of_file(path: Path, config: Config, arch: str | None) -> Weights:
    content = _read(path)
    state = _state_dict(path, content)
    epoch = content.get("epoch")
    if arch in _OURS:
        config = override_config(config, ["model.backbone.kind=torchvision", f"model.backbone.name={arch}"])
        arch = None
    by_authors = any(name.partition(".")[0] in _AUTHORS for name in state)
    if by_authors and arch is not None:
        raise UserError(f"{path} is a checkpoint of the MSF authors' code, whose networks are {', '.join(_OURS)}")
    if by_authors:
        form, load = "MSF authors' checkpoint", _authors(path, state, config)
    else:
        form, load = "state dict", _plain(path, state, config, arch)
    trained: tuple[EncoderName, ...] = ("online", "target") if by_authors else ("weights",)
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
        fresh=lambda: _network(config, arch)[0],
    )


def _authors(path: Path, state: StateDict, config: Config) -> Callable[[EncoderName], nn.Module]:
    """Backbones from the authors' names, by way of our whole model, so that heads are checked like the rest."""
    renamed: StateDict = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part in _AUTHORS:
            ours = _AUTHORS[part]
            if part != "predict_q":
                inner = "projector" if rest.startswith("fc.") else "backbone"
                rest = f"{inner}.{rest.removeprefix('fc.')}"
            renamed[f"{ours}.{rest}"] = tensor
        elif name not in _AUTHORS_BANK:
            raise UserError(f"{path}: the weight {name!r} does not belong into a checkpoint of the MSF authors' code")

    def load(name: EncoderName) -> nn.Module:
        model = build_model(config.model, seed=0)
        _load_strictly(model, renamed, path, "the MSF authors' names, in ours")
        return model.online.backbone if name == "online" else model.target.backbone

    return load


def _plain(path: Path, state: StateDict, config: Config, arch: str | None) -> Callable[[EncoderName], nn.Module]:
    """A backbone from a state dict of its own names; a classifier's weights are known, and not used."""

    def load(name: EncoderName) -> nn.Module:
        network, heads = _network(config, arch)
        kept = {key: tensor for key, tensor in state.items() if not key.startswith(heads)}
        _load_strictly(network, kept, path, arch or config.model.backbone.kind)
        return network

    return load


def _network(config: Config, arch: str | None) -> tuple[nn.Module, tuple[str, ...]]:
    """A backbone with the config's seed, and what the names of its classifier's weights begin with.

    Raises:
        UserError: if there is no such network, or it takes no views of the config's size.
    """
    if arch is None:
        return build_model(config.model, seed=config.seed).online.backbone, ("fc.",)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network, heads = _timm(arch.removeprefix(TIMM)) if arch.startswith(TIMM) else _torchvision(arch)
    size = config.views.size
    try:
        with torch.no_grad():
            features = network.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"--arch {arch} takes no views of {size} px ({error}); set views.size") from error
    if features.ndim != 2:
        raise UserError(f"--arch {arch} gives {list(features.shape)} for one view instead of features [1, F]")
    return network, heads


def _torchvision(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    if name not in torchvision.models.list_models(torchvision.models):
        raise UserError(
            f"--arch {name}: torchvision has no such classification net; the nets of timm are written {TIMM}NAME"
        )
    network = torchvision.models.get_model(name, weights=None)
    head = next(head for head in _HEADS if hasattr(network, head))
    setattr(network, head, nn.Identity())
    return network, (f"{head}.",)


def _timm(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"--arch {TIMM}{name} needs the package timm: pip install 'msf-faiss[timm]'") from error
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise UserError(f"--arch {TIMM}{name}: {error}; `timm.list_models()` has the names") from error
    heads = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    return network, tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))


def _read(path: Path) -> dict[str, Any]:
    """What the file holds, a mapping; nothing in it is executed."""
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        # The authors save their options. A warning of torch's is of files that it then refuses, or reads.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused: it holds more than tensors, which could execute code when it is loaded, or is no file of"
            " torch.save; save its state dict alone, e.g. as .safetensors"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read as weights ({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not a state dict")
    return content


def _state_dict(path: Path, content: Mapping[str, Any]) -> StateDict:
    """The state dict in a file's content, without the `module` of DataParallel in its names."""
    state = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), content)
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if not state or others:
        found = f"{others[0]!r} is no tensor" if others else "it is empty"
        raise UserError(f"{path}: holds no state dict ({found})")
    return {".".join(part for part in name.split(".") if part != "module"): value for name, value in state.items()}


def _load_strictly(network: nn.Module, state: StateDict, path: Path, what: str) -> None:
    """Load every weight; one too many, one too few or one of another shape is an error."""
    expected = network.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    resized = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    wrong = [
        f"{words} {', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''}"
        for words, names in (("missing:", missing), ("unexpected:", unexpected), ("of another shape:", resized))
        if names
    ]
    if wrong:
        raise UserError(
            f"{path}: its weights do not fit the network ({what}): {'; '.join(wrong)}. Name the network that they are"
            " of by --arch or --set model.backbone.…"
        )
    network.load_state_dict(state, strict=True)
