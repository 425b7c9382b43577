"""Try one input at a door of the library: it is taken, or refused by a UserError that names the file; and soon."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from msf_faiss.errors import UserError

SECONDS = 10
BYTES = 2 * 2**30


def refusal(door: Callable[[], object], name: str) -> str | None:
    """What the door says against the input; None if it takes it.

    Raises:
        AssertionError: if the refusal does not name the file, or takes too long or too much memory.
    """
    before = _peak_memory()
    try:
        with _time_limit():
            door()
        said = None
    except UserError as error:
        said = str(error)
    assert said is None or name in said, f"does not name {name}: {said}"
    assert (used := _peak_memory() - before) < BYTES, f"took {used:,} bytes"
    return said


@contextmanager
def _time_limit() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"took more than {SECONDS} seconds")

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _peak_memory() -> int:
    """Largest resident size of this process since the last call, in bytes."""
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(peak.split()[1])
