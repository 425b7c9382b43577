"""Find a network's weights in a state dict, whatever their names begin with.

MoCo writes `encoder_q.conv1.weight`, DINO `teacher.backbone.blocks.0…`, others `backbone.…`, `model.encoder.…`, or
numbers in place of names because the network was rebuilt as `nn.Sequential`. Every weight of the network must be there,
in its shape, under one common prefix; so a renamed layer never leads to the score of a random network.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from msf_faiss.errors import UserError
from msf_faiss.evaluate.results import EvalEncoder
from msf_faiss.evaluate.weight_file import StateDict

_COUNTER = "num_batches_tracked"  # of a batch norm; old files have none, and torch takes 0
_ASIDE = (  # beside a backbone, these belong to a classifier, a projection or a bank
    *("fc", "classifier", "head", "heads", "last_layer", "mlp", "neck", "projector", "projection", "projection_head"),
    *("predictor", "prediction_head", "predict_q", "prototypes", "queue", "queue_ptr", "labels", "criterion"),
)
_AVERAGES = {"teacher", "target", "momentum", "ema", "k", "t"}  # words in the name of a moving average
_DEEPEST = 20  # parts of a prefix
_SHOWN = 3  # weights that an error lists


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How the weights under a prefix fit a network."""

    prefix: str  # "" or ends with a dot
    names: Mapping[str, str]  # by the network's name of a weight: its name in the file
    missing: Sequence[str]
    unexpected: Sequence[str]
    unfit: Sequence[str]  # of another shape or kind

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.unfit)

    def describe(self) -> str:
        """The problems, if there are any."""
        problems = (("missing:", self.missing), ("unexpected:", self.unexpected), ("of another shape:", self.unfit))
        return "; ".join(
            f"{problem} {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
            for problem, names in problems
            if names
        )


def find_fits(network: nn.Module, state: StateDict, heads: Sequence[str] = ()) -> list[Fit]:
    """The prefixes under which the whole network is; if there is none, the one that has most of it, or nothing.

    `heads`: first parts of the names of the network's classifier, whose weights are ignored.
    """
    fits: list[Fit] = []
    expected = network.state_dict()
    for names in _namings(network, expected):
        wanted = set(names.values())
        hits = Counter(prefix for name in state for prefix, rest in _splits(name) if rest in wanted)
        most = max(hits.values(), default=0)
        fits += [fit_under(prefix, names, expected, state, heads) for prefix in hits if 2 * hits[prefix] > most]
        if complete := [fit for fit in fits if fit.complete]:
            return complete
    return sorted(fits, key=lambda fit: (len(fit.missing) + len(fit.unfit), len(fit.unexpected)))[:1]


def fit_under(
    prefix: str, names: Mapping[str, str], expected: Mapping[str, Tensor], state: StateDict, heads: Sequence[str] = ()
) -> Fit:
    """How the weights under `prefix`, whose `names` in the file are given by the network's, fit the `expected` ones."""
    own = {name: f"{prefix}{rest}" for name, rest in names.items()}
    wanted, inside = set(own.values()), {rest.partition(".")[0] for rest in names.values()}
    ignored = {*heads, *_ASIDE} - inside
    rests = ((name, name.removeprefix(prefix).partition(".")[0]) for name in state if name.startswith(prefix))
    return Fit(
        prefix=prefix,
        names=own,
        missing=[place for name, place in own.items() if place not in state and not _is_optional(name)],
        unexpected=[name for name, first in rests if name not in wanted and first not in ignored],
        unfit=[place for name, place in own.items() if place in state and _is_unfit(state[place], expected[name])],
    )


def pick_encoders(fits: Sequence[Fit], path: Path) -> dict[EvalEncoder, Fit]:
    """Name the complete `fits` "weights", or "online" and "target" if a moving average is among them.

    A teacher comes first, because those who train one evaluate it.

    Raises:
        UserError: if several encoders remain.
    """
    if len(fits) == 1:
        return {"weights": fits[0]}
    averages = [fit for fit in fits if _AVERAGES.intersection(re.split(r"[._]", fit.prefix))]
    others = [fit for fit in fits if fit not in averages]
    if len(averages) != 1 or len(others) != 1:
        raise UserError(
            f"{path}: has this network several times, under {', '.join(repr(fit.prefix) for fit in fits)}; save the "
            "state dict of one of them"
        )
    if "teacher" in averages[0].prefix:
        return {"target": averages[0], "online": others[0]}
    return {"online": others[0], "target": averages[0]}


def load(network: nn.Module, state: StateDict, fit: Fit, path: Path) -> None:
    """Load the weights of a complete fit.

    Raises:
        UserError: if some are not finite.
    """
    weights = {name: state[own] for name, own in fit.names.items() if own in state}
    for name, tensor in weights.items():
        _check_values(tensor, fit.names[name], path)
    network.load_state_dict(network.state_dict() | weights)


def _check_values(tensor: Tensor, name: str, path: Path) -> None:
    """Raise a UserError if a weight has values with which no network can compute."""
    broken = tensor.float().isfinite().logical_not().sum() if tensor.is_floating_point() else 0
    if broken:
        raise UserError(
            f"{path}: {int(broken):,} of the {tensor.numel():,} values of {name} are not finite (NaN or infinite): the "
            "file is damaged, or its training had diverged; use another file"
        )
    if name.endswith("running_var") and bool((tensor < 0).any()):
        raise UserError(f"{path}: {name} has negative variances: the file is damaged; use another file")


def _is_optional(name: str) -> bool:
    """Whether a missing weight stays 0, as in a new network."""
    return name.rpartition(".")[2] == _COUNTER


def _is_unfit(tensor: Tensor, expected: Tensor) -> bool:
    """Whether a tensor of a file cannot become the weight `expected`."""
    usable = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized
    return not usable or tensor.is_complex() or tensor.shape != expected.shape


def describe_names(state: StateDict) -> str:
    """The first parts of the names in a file."""
    first = list(dict.fromkeys(name.partition(".")[0] for name in state))
    return f"{', '.join(first[: 2 * _SHOWN])}{', …' if len(first) > 2 * _SHOWN else ''}"


def _namings(network: nn.Module, expected: Mapping[str, Tensor]) -> Iterator[dict[str, str]]:
    """Names of the network's weights in a file: its own, and those of its children in an `nn.Sequential`."""
    yield {name: name for name in expected}
    numbers = {name: str(number) for number, (name, _) in enumerate(network.named_children())}
    if all(name.partition(".")[0] in numbers for name in expected):
        parts = ((name, *name.partition(".")) for name in expected)
        yield {name: f"{numbers[first]}.{rest}" for name, first, _, rest in parts}


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Each way to divide a name into a prefix and the rest."""
    parts = name.split(".")
    for count in range(min(len(parts), _DEEPEST)):
        yield "".join(f"{part}." for part in parts[:count]), ".".join(parts[count:])
