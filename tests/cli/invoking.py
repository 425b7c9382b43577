"""The command line in this process: a new one takes seconds to start."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


Invoke = Callable[..., Done]


def invoker(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Invoke:
    from msf_faiss_cli.main import main

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["msf-faiss", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(int(ended.value.code or 0), *capfd.readouterr())

    return run
