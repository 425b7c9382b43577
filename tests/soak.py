"""Resource usage of a process and its children: memory, open files and threads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

_OWN = ("Pss_Anon:", "Pss_Shmem:")


class Usage(NamedTuple):
    """Of a process and all its descendants together."""

    seconds: float
    memory: int  # bytes not backed by files; shared memory counts once
    files: int
    threads: int
    processes: int


def measure_usage(process: int, began: float) -> Usage | None:
    """Current usage; None if the process has ended."""
    family = [process]
    for parent in family:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                family += [int(child) for child in children.read_text().split()]
            except OSError:
                continue
    memory = files = threads = 0
    for member in family:
        folder = Path(f"/proc/{member}")
        try:
            rollup = (folder / "smaps_rollup").read_text()
            memory += 1024 * sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith(_OWN))
            files += len(list((folder / "fd").iterdir()))
            threads += len(list((folder / "task").iterdir()))
        except OSError:
            if member == process:
                return None
    return Usage(time.monotonic() - began, memory, files, threads, len(family))
