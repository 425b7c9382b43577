"""The command line as tests call it: in a new process, or in this one, since a new one takes seconds to start."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]

TINY = [
    *("--set", "data.images=48", "--set", "data.test_images=20", "--set", "data.size=16", "--set", "views.size=16"),
    *("--set", "model.backbone.width=4", "--set", "train.batch_size=16", "--set", "train.log_every=1"),
    *(
        "--set",
        "bank.capacity=40",
        "--set",
        "train.epochs=2",
        "--set",
        "train.threads=1",
        "--set",
        "optimizer.warmup_epochs=0",
    ),
]
"""Turns the shipped demo config into a run of six steps and a second."""


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


Invoke = Callable[..., Done]


def invoker(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Invoke:
    from msf_faiss_cli.main import main

    # 4,000 steps of a linear layer on 48 images would take a second and show no more.
    monkeypatch.setattr("msf_faiss.evaluate.linear.MIN_STEPS", 80)

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["msf-faiss", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(int(ended.value.code or 0), *capfd.readouterr())

    return run
