"""The device that a config or a command line names."""

import torch

from msf_faiss.errors import UserError

CPU = torch.device("cpu")


def select_device(name: str) -> torch.device:
    """The device for `train.device` or `--device`: "cpu", "cuda" (the current device), or "auto" (CUDA if available).

    Raises:
        UserError: if "cuda" is requested and torch finds no CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch finds no CUDA device on this machine; use cpu or auto")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)
