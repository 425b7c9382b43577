"""Load backbones from checkpoints of msf-faiss, and from files of weights that other code wrote.

Two naming schemes of files are supported:

- the MSF authors' (train_msf.py, and CMSF's): `encoder_q.…`, `encoder_t.…` and `predict_q.…`; the bank is ignored;
- torchvision's and timm's names of a classification network, with or without its classifier, after any prefix
  (`backbone.`, `encoder_q.`, `teacher.backbone.`).

Every weight must match the network. Files of torch.save are read with `weights_only`, which executes no code in them.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torchvision
from torch import nn

from msf_faiss.checkpoint.format import FOLDER, MANIFEST, find_checkpoint
from msf_faiss.checkpoint.load import load_model
from msf_faiss.config import Config, TorchvisionBackbone
from msf_faiss.config.load import load_config, override_config
from msf_faiss.device import CPU
from msf_faiss.embeddings.inputs import override_inputs
from msf_faiss.errors import UserError
from msf_faiss.evaluate.find_backbone import Fit, describe_names, find_fits, fit_under, pick_encoders
from msf_faiss.evaluate.find_backbone import load as load_fit
from msf_faiss.evaluate.results import EvalEncoder
from msf_faiss.evaluate.weight_file import StateDict, read_weights
from msf_faiss.files import kind_of
from msf_faiss.models import build_model

_TIMM = "timm:"
"""Prefix of the name of a timm network."""

_CONFIGURABLE = get_args(TorchvisionBackbone.model_fields["name"].annotation)
_HEADS = ("fc", "classifier", "heads", "head")  # names of the classifier in torchvision's networks
_AUTHORS = {"encoder_q": "online", "encoder_t": "target", "predict_q": "predictor"}
_AUTHORS_BANK = ("queue", "labels", "pool", "index_queue")  # begin its names; the last two are CMSF's
_RESNET_STEM = (64, 3, 7, 7)  # shape of its first weight
_VIT_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}  # by dimensions


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
    notes: tuple[str, ...] = ()  # on what was chosen for a file

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
    return _open_file(path, load_config(base, overrides), arch, overrides)


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


def _open_file(path: Path, config: Config, arch: str | None, overrides: Sequence[str]) -> Weights:
    state, epoch = read_weights(path)
    if arch in _CONFIGURABLE:
        config = override_config(config, ["model.backbone.kind=torchvision", f"model.backbone.name={arch}"])
        arch = None
    notes: tuple[str, ...] = ()
    if arch is not None and arch.startswith(_TIMM):
        config, notes = _timm_views(arch, config, overrides)
    trained: tuple[EvalEncoder, ...]
    if {name.partition(".")[0] for name in state}.issuperset(_AUTHORS):
        if arch is not None:
            raise UserError(
                f"{path} is a checkpoint of the MSF authors' code; --arch must be one of {', '.join(_CONFIGURABLE)}"
            )
        form, trained, load = "MSF authors' checkpoint", ("online", "target"), _authors_loader(path, state, config)
    else:
        encoders = _find_encoders(path, state, config, arch)
        form, trained, load = "state dict", tuple(encoders), _plain_loader(path, state, config, arch, encoders)
        notes += tuple(
            f"{name}: {path}, names that begin with {fit.prefix}" for name, fit in encoders.items() if fit.prefix
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Weights(
        path=path,
        run_dir=None,
        form=form,
        digest=digest,
        step=None,
        epoch=epoch,
        config=config,
        net=config.model.backbone.model_dump(mode="json") if arch is None else {"arch": arch},
        trained=trained,
        load=load,
        fresh=lambda: _build_network(config, arch)[0],
        notes=notes,
    )


def _authors_loader(path: Path, state: StateDict, config: Config) -> Callable[[EvalEncoder], nn.Module]:
    """Backbones with the authors' names, loaded as part of our whole model so that the heads are checked too."""
    renamed: StateDict = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part in _AUTHORS:
            if part != "predict_q":
                inner = "projector" if rest.startswith("fc.") else "backbone"
                rest = f"{inner}.{rest.removeprefix('fc.')}"
            renamed[f"{_AUTHORS[part]}.{rest}"] = tensor
        elif not name.startswith(_AUTHORS_BANK):
            raise UserError(f"{path}: unexpected weight {name!r} in a checkpoint of the MSF authors' code")

    def load(name: EvalEncoder) -> nn.Module:
        model = build_model(config.model, seed=0)
        expected = model.state_dict()
        fit = fit_under("", {name: name for name in expected}, expected, renamed)
        if not fit.complete:
            raise _misfit(path, "the MSF authors' names, converted to ours", fit, renamed)
        load_fit(model, renamed, fit, path)
        return model.online.backbone if name == "online" else model.target.backbone

    return load


def _find_encoders(path: Path, state: StateDict, config: Config, arch: str | None) -> dict[EvalEncoder, Fit]:
    """The encoders in a state dict, the one to evaluate by default first."""
    network, heads = _build_network(config, arch)
    fits = find_fits(network, state, heads)
    if not fits or not fits[0].complete:
        backbone = config.model.backbone
        name = backbone.name if isinstance(backbone, TorchvisionBackbone) else backbone.kind
        raise _misfit(path, arch or name, fits[0] if fits else None, state)
    return pick_encoders(fits, path)


def _plain_loader(
    path: Path, state: StateDict, config: Config, arch: str | None, encoders: Mapping[EvalEncoder, Fit]
) -> Callable[[EvalEncoder], nn.Module]:
    def load(name: EvalEncoder) -> nn.Module:
        network = _build_network(config, arch)[0]
        load_fit(network, state, encoders[name], path)
        return network

    return load


def _misfit(path: Path, network: str, fit: Fit | None, state: StateDict) -> UserError:
    """The error of a file whose weights do not fit, with the network that they would fit if it is known."""
    problems = "it has none of them" if fit is None else fit.describe()
    known = _recognize(state)
    remedy = (
        f"They look like those of {known}: add --arch {known}"
        if known
        else ("Name their network with --arch or --set model.backbone.…")
    )
    return UserError(
        f"{path}: the weights do not fit the network ({network}): {problems}. Names in the file begin with "
        f"{describe_names(state)}. {remedy}"
    )


def _recognize(state: StateDict) -> str | None:
    """The name for --arch of a ResNet of torchvision or a vision transformer of timm that the file contains."""
    if any(tensor.shape == _RESNET_STEM for tensor in state.values()):
        for name in _CONFIGURABLE:
            with torch.device("meta"):
                network, heads = _torchvision(name)
            if any(fit.complete for fit in find_fits(network, state, heads)):
                return str(name)
    patches = next((tensor for name, tensor in state.items() if name.endswith("patch_embed.proj.weight")), None)
    if patches is not None and patches.ndim == 4 and len(patches) in _VIT_SIZES:
        return f"{_TIMM}vit_{_VIT_SIZES[len(patches)]}_patch{patches.shape[-1]}_224"
    return None


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


def _timm_views(arch: str, config: Config, overrides: Sequence[str]) -> tuple[Config, tuple[str, ...]]:
    """The config with the normalisation and the crop of timm's own config of a network; notes on what differs.

    What `overrides` set stays.
    """
    try:
        from timm.models import get_pretrained_cfg

        known = get_pretrained_cfg(arch.removeprefix(_TIMM))
    except (ImportError, RuntimeError):  # reported when the network is built
        return config, ()
    if known is None:
        return config, ()
    size = config.views.size
    wanted = {"mean": list(known.mean), "std": list(known.std), "eval_resize": int(size / known.crop_pct)}
    given = {override.partition("=")[0] for override in overrides}
    taken = {key: value for key, value in wanted.items() if not given & {"views", f"views.{key}"}}
    notes = []
    if taken:
        config = override_config(config, [f"views.{key}={value}" for key, value in taken.items()])
        settings = ", ".join(f"views.{key} {value}" for key, value in taken.items())
        notes.append(f"--arch {arch}: {settings}, as in timm's config of the network; --set overrides them")
    if known.interpolation != "bilinear":
        notes.append(f"--arch {arch}: timm resizes with {known.interpolation} interpolation, evaluations with bilinear")
    if known.input_size[1] != size:
        notes.append(f"--arch {arch}: timm's config has views of {known.input_size[1]} px, views.size is {size}")
    return config, tuple(notes)
