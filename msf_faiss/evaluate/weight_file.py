"""Read a state dict from a file that other code wrote, without executing code in it."""

import argparse
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from msf_faiss.errors import UserError

StateDict = dict[str, Tensor]

_ZIP, _SAFETENSORS = b"PK\x03\x04", re.compile(rb".{8}\{", re.DOTALL)
_NOT_WEIGHTS = {
    rb"version https://git-lfs": "is a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`",
    rb"\s*<(!doctype|html|\?xml)": "is a web page, not weights: the download failed; download the file again",
    rb"\x1f\x8b": "is compressed with gzip; unpack it first",
    rb"\x89HDF": "is an HDF5 file, as Keras writes it, and not weights of PyTorch",
}
"""By the pattern of a file's first bytes."""
_WRAPPERS = {"module", "_orig_mod"}  # parts of names that DataParallel and torch.compile add
_DEEPEST = 8  # dicts within dicts


def read_weights(path: Path) -> tuple[StateDict, float | None]:
    """The tensors in a file by name, and its epoch if it has one.

    A state dict under `state_dict` or `model` is preferred. Otherwise dicts within dicts become one, with dotted names:
    `teacher.backbone.conv1.weight`. Names lose the parts that DataParallel and torch.compile add.

    Raises:
        UserError: if the file is no file of weights, or has no tensors.
    """
    content = _load(path)
    preferred = [content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)]
    state: StateDict = next(filter(None, (dict(_tensors(inner)) for inner in (*preferred, content))), {})
    if not state:
        chosen = preferred[0] if preferred else content
        first = next(iter(chosen), None)
        problem = f"{first!r} is not {'a tensor' if isinstance(first, str) else 'a name'}" if chosen else "it is empty"
        raise UserError(f"{path}: expected a state dict, but {problem}")
    epoch = content.get("epoch")
    named = {".".join(part for part in name.split(".") if part not in _WRAPPERS): state[name] for name in state}
    return named, float(epoch) if isinstance(epoch, int) else None


def _tensors(content: Mapping[Any, Any], depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors under text keys; the state of an optimizer has numbers as keys."""
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield key, value
        elif isinstance(key, str) and isinstance(value, Mapping) and depth < _DEEPEST:
            yield from ((f"{key}.{name}", tensor) for name, tensor in _tensors(value, depth + 1))


def _load(path: Path) -> dict[Any, Any]:
    try:
        with path.open("rb") as file:
            start = file.read(1024)
        for pattern, problem in _NOT_WEIGHTS.items():
            if re.match(pattern, start, re.IGNORECASE):
                raise UserError(f"{path}: {problem}")
        if _SAFETENSORS.match(start) or (path.suffix == ".safetensors" and not start.startswith(_ZIP)):
            return dict(safetensors.torch.load_file(path))
        # Torch warns about files that it then rejects, or reads.
        with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with path.open("rb") as file:  # of a path, torch would believe the ending
                content = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path}: refused, because it contains more than tensors{f' ({found[1]})' if found else ''}, which could "
            "execute code, or was not written by torch.save; save only its state dict, e.g. as .safetensors"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"{path}: cannot be read as weights ({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a state dict, found {type(content).__name__}")
    return content


def _harmless() -> list[Any]:
    """What checkpoints often contain besides tensors: options, and numbers of NumPy such as the best accuracy."""
    scalar = np.float64(0).__reduce__()[0]  # under one name in NumPy 1, another in NumPy 2
    numbers = [np.float64, np.float32, np.int64, np.int32, np.bool_]
    return [
        argparse.Namespace,
        np.dtype,
        *(type(np.dtype(number)) for number in numbers),
        *((scalar, f"numpy.{package}.multiarray.scalar") for package in ("core", "_core")),
    ]
