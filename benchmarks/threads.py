"""Measure commands on a quiet or busy machine: default threads, one thread, and the libraries' own ways of waiting.

    python benchmarks/threads.py [--rounds 3] [--images 2000] [--steps 50] [--busy 1]

Trains briefly on the demo's images, then runs pretrain, eval-transfer, eval-linear --fast and inspect-neighbors next to
processes that keep a core busy each. Variants take turns within each round. Times are medians in seconds of whole
commands, start included; ratios are medians of the ratios to one thread of each round.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from msf_faiss.threads import WAITING

ONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE"}
SPINNING = {"GOMP_SPINCOUNT": "300000", "OPENBLAS_THREAD_TIMEOUT": "26"}
COMMANDS = (
    ("eval-transfer", "--no-keep"),
    ("eval-linear", "--fast", "--no-keep"),
    ("inspect-neighbors", "--clusters", "8", "--map", "tsne", "--out", "page.html"),
)


def run(folder: Path, *arguments: str, **environment: str) -> float:
    """Run a command in `folder`; return the seconds that it took."""
    inherited = {name: value for name, value in os.environ.items() if name not in {*ONE, *WAITING}}
    start = time.perf_counter()
    command = [sys.executable, "-m", "msf_faiss_cli", *arguments]
    subprocess.run(command, cwd=folder, env={**inherited, **environment}, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2_000, help="training images; a quarter as many are held out")
    parser.add_argument("--steps", type=int, default=50, help="training steps")
    parser.add_argument("--busy", type=int, default=1, help="other processes")
    arguments = parser.parse_args()
    variants = {"default": {}, "one thread": ONE, "sleeping": SLEEPING, "spinning": SPINNING}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = (f"data.images={arguments.images}", f"data.test_images={arguments.images // 4}")
        settings = (*sizes, f"train.max_steps={arguments.steps}")
        training = ("pretrain", "demo", *(word for each in settings for word in ("--set", each)))
        run(folder, *training, "--out", "run")
        commands = {name: (name, "run", *options) for name, *options in COMMANDS} | {"pretrain": training}
        times: dict[tuple[str, str], list[float]] = {(name, variant): [] for name in commands for variant in variants}
        with busy(arguments.busy):
            for _ in range(arguments.rounds):
                for name, command in commands.items():
                    for variant, environment in variants.items():
                        times[name, variant].append(run(folder, *command, **environment))
    for (name, variant), found in times.items():
        ratio = statistics.median(own / one for own, one in zip(found, times[name, "one thread"], strict=True))
        print(f"{name:<18} {variant:<11} {statistics.median(found):7.1f} s  {ratio:5.2f} x")


if __name__ == "__main__":
    main()
