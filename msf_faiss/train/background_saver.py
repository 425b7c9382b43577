"""Saves in the background: training waits for a copy of the state, and a thread writes it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from msf_faiss.checkpoint.format import Tensors
from msf_faiss.run.events import CheckpointSaved


class BackgroundSaver:
    """Writes checkpoints in a thread, one at a time.

    Args:
        write: called with (step, epoch, tensors by file and name), writes a checkpoint and returns its path; may raise.
        background: False: write in the calling thread, without a copy.
    """

    def __init__(self, write: Callable[[int, float, Mapping[str, Tensors]], Path], *, background: bool) -> None:
        self._write = write
        self._background = background
        self._thread: threading.Thread | None = None
        self._saved: list[CheckpointSaved] = []
        self._failure: BaseException | None = None

    def save(self, step: int, epoch: float, tensors: Mapping[str, Tensors]) -> None:
        """Save the current values of `tensors`, which may change on return. Raises the error of the previous save."""
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
        # A daemon thread, so that a process that ends at once does not wait for the disk.
        self._thread = threading.Thread(
            target=self._work, args=(step, epoch, copy, began, stalled), name="checkpoint", daemon=True
        )
        self._thread.start()

    def saved(self) -> list[CheckpointSaved]:
        """Checkpoints completed since the last call. Does not wait; raises the error of a failed save."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
        if self._thread is None:
            self._raise()
        finished, self._saved = self._saved, []
        return finished

    def wait(self) -> None:
        """Wait for the save in progress; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Wait for the save in progress on exit, except after KeyboardInterrupt."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to report
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
