"""Signals to a run: the first one ends it with a checkpoint, a second one ends it at once.

SIGINT is Ctrl-C. SIGTERM and SIGUSR1 come from a scheduler that reclaims the machine (Slurm sends SIGUSR1 in advance
with `--signal=USR1@120`), a container engine, or torchrun.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from msf_faiss.errors import EXIT_RESTART

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_GRACE = 5.0  # seconds from the second signal until the process is ended from outside its main thread


class StoppedAtOnce(KeyboardInterrupt):
    """A signal arrived before there was anything to save, or a second time."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


class StopRequest:
    """Whether a signal has asked the run to stop; call it between two steps.

    Args:
        quiet: print nothing, because another rank does.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._training = False
        self._signal: int | None = None  # the first one

    def __call__(self) -> bool:
        self._training = True
        return self._signal is not None

    @property
    def code(self) -> int:
        """Exit code of a run that was stopped with a checkpoint."""
        return 130 if self._signal == signal.SIGINT else EXIT_RESTART

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the context.

        Raises:
            StoppedAtOnce: from any line of it, at a signal before the first step or at a second one.
        """
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        read, write = os.pipe()
        os.set_blocking(write, False)
        wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=_end_hung_process, args=(read,), name="signals", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            os.close(write)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise StoppedAtOnce(128 + number)
        self._signal = number
        if not self._training:
            self._say("stopped before the first step; there was nothing to save")
            raise StoppedAtOnce(self.code)
        again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
        self._say(f"{signal.Signals(number).name}: stopping after this step with a checkpoint; {again} stops at once")

    def _say(self, text: str) -> None:
        if not self._quiet:
            with contextlib.suppress(OSError):  # closed, or a full pipe
                os.write(2, f"{text}\n".encode())  # sys.stderr refuses, if the signal came in the middle of a write


def _end_hung_process(read: int) -> None:
    """End the process a few seconds after the second signal, whose handler cannot run while the main thread hangs."""
    with open(read, "rb", buffering=0) as signals:
        count = 0
        while number := signals.read(1):
            count += number[0] in _SIGNALS
            if count == 2:
                time.sleep(_GRACE)
                os._exit(128 + number[0])
