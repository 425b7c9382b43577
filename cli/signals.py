"""What signals do to a run: the first asks it to end with a checkpoint, the second ends it at once.

SIGINT is Ctrl-C. SIGTERM and SIGUSR1 come from what runs the machine: a scheduler that wants it back (Slurm sends
SIGUSR1 ahead if `--signal=USR1@120` asks for it), a container engine, torchrun.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import click

from msf_faiss.errors import EXIT_RESTART

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_PATIENCE = 5.0  # seconds that a process which is to end at once has for it, should it hang in a call


class EndedAtOnce(KeyboardInterrupt):
    """A signal came before there was anything to save, or a second time."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


class Stopping:
    """Whether a run was asked to stop; to be called between two steps.

    Args:
        quiet: say nothing; another process does.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._training = False
        self._asked: int | None = None  # the first signal's number

    def __call__(self) -> bool:
        self._training = True
        return self._asked is not None

    @property
    def code(self) -> int:
        """Exit code of a run that has stopped with a checkpoint."""
        return 130 if self._asked == signal.SIGINT else EXIT_RESTART

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals until this is left.

        Raises:
            EndedAtOnce: in the middle of whatever goes on, at a signal before the first step or at a second one.
        """
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        read, write = os.pipe()
        os.set_blocking(write, False)
        wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=_end_what_hangs, args=(read,), name="signals", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            os.close(write)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            raise EndedAtOnce(128 + number)
        self._asked = number
        if not self._training:
            self._say("stopped before the first step; there was nothing to save")
            raise EndedAtOnce(self.code)
        again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
        self._say(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint; {again} ends at once")

    def _say(self, text: str) -> None:
        if not self._quiet:
            click.echo(text, err=True)


def _end_what_hangs(read: int) -> None:
    """End the process some seconds after the second signal: its handler cannot run while the main thread hangs."""
    with open(read, "rb", buffering=0) as signals:
        seen = 0
        while number := signals.read(1):
            seen += number[0] in _SIGNALS
            if seen == 2:
                time.sleep(_PATIENCE)
                os._exit(128 + number[0])
