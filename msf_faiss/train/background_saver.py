"""Saving while training goes on: a step waits for a copy of the state, and a thread writes that."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from msf_faiss.checkpoint.format import Tensors
from msf_faiss.run.events import CheckpointSaved


class BackgroundSaver:
    """Writes checkpoints in a thread, never more than one at a time.

    Args:
        write: writes the tensors of a step, by file and name, and returns the checkpoint's path; gets (step, epoch,
            tensors), and may raise.
        background: false: write at once and without a copy.
    """

    def __init__(self, write: Callable[[int, float, Mapping[str, Tensors]], Path], *, background: bool) -> None:
        self._write = write
        self._background = background
        self._thread: threading.Thread | None = None
        self._saved: list[CheckpointSaved] = []
        self._failure: BaseException | None = None

    def save(self, step: int, epoch: float, tensors: Mapping[str, Tensors]) -> None:
        """Save `tensors` as they are now. On return they may change.

        Raises:
            Exception: what `write` did, of the save before; of this one too if it is not in the background.
        """
        began = time.perf_counter()
        self.wait()
        if not self._background:
            self._work(step, epoch, tensors, began, time.perf_counter() - began)
            self._raise()
            return
        copy = {
            file: {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
            for file, named in tensors.items()
        }
        stalled = time.perf_counter() - began
        # A daemon, since a process that is told to end at once must not wait for a disk.
        self._thread = threading.Thread(
            target=self._work, args=(step, epoch, copy, began, stalled), name="checkpoint", daemon=True
        )
        self._thread.start()

    def saved(self) -> list[CheckpointSaved]:
        """The checkpoints that were finished since the last call. Does not wait.

        Raises:
            Exception: what `write` did, if a save failed.
        """
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
        if self._thread is None:
            self._raise()
        finished, self._saved = self._saved, []
        return finished

    def wait(self) -> None:
        """Wait for the save in progress.

        Raises:
            Exception: what `write` did, if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """On leaving, a save in progress is brought to its end, unless all is to end at once."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            with contextlib.suppress(Exception):  # the error that ends the run is the one to tell
                self.wait()
            raise
        self.wait()

    def _work(self, step: int, epoch: float, tensors: Mapping[str, Tensors], began: float, stalled: float) -> None:
        try:
            path = self._write(step, epoch, tensors)
        except BaseException as error:
            self._failure = error
            return
        seconds = time.perf_counter() - began
        self._saved.append(CheckpointSaved(step=step, epoch=epoch, path=path, seconds=seconds, stalled_seconds=stalled))

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
