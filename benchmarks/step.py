"""Compare complete training steps, from encoded images to the optimizer: the authors' loop and `msf-faiss pretrain`.

    python benchmarks/step.py cifar DATA [--banks 131072:flat 1048576:ivf] [--batch 256] [--rounds 5] [--steps 2]
    python benchmarks/step.py imagenette DATA --batch 32 [--device cuda] [--json FILE]

cifar: ResNet-18 with a 3x3 stem on the 32 px images in DATA (a Parquet file). imagenette: ResNet-50 at 224 px.

Each variant runs in its own process with its own workers, which are stopped (SIGSTOP) while another has its turn. In
each round, every variant runs --steps steps, in a new random order. The first round warms up. images/s are medians over
the rounds, ratios are medians of the ratios of each round. The ceiling is forward, backward and target forward of the
same network in the same precision on random tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bank_meters import machine

from msf_faiss.config import Config
from msf_faiss.config.load import load_config

SETTINGS = {
    "cifar": ("cifar10", "resnet18"),
    "imagenette": ("imagenet", "resnet50"),
}


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    variant: str
    bank: int | None
    kind: str | None
    seconds: float  # per step
    images_per_second: float
    faster_than_authors: float | None
    share_of_ceiling: float | None
    rounds: list[float]  # seconds per step in each round


class Process:
    """A variant in its own process group, which is stopped except for its turns."""

    def __init__(self, settings: dict[str, Any]) -> None:
        command = [sys.executable, str(Path(__file__).with_name("step_variants.py")), json.dumps(settings)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._read()  # wait until it is ready
        self._signal(signal.SIGSTOP)

    def run(self, steps: int) -> float:
        """Run `steps` steps; return the mean seconds per step."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        seconds = json.loads(self._read())
        self._signal(signal.SIGSTOP)
        return statistics.fmean(seconds)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a variant ended early; its message is above")
        return line

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def make_config(options: argparse.Namespace, capacity: int, kind: str) -> Config:
    """Return the config of our run, from the shipped config of the setting."""
    shipped, network = SETTINGS[options.setting]
    kind, _, scan = kind.partition("-")
    overrides = [
        "data.kind=parquet",
        f"data.path={options.data}",
        f"data.workers={options.our_workers}",
        f"model.backbone.name={network}",
        f"bank={{kind: {kind}, capacity: {capacity}, k: 5{f', scan: {scan}' if scan else ''}}}",
        f"train.batch_size={options.batch}",
        f"train.precision={options.precision}",
        f"train.device={options.device}",
        f"train.threads={options.threads or 'null'}",
        "checkpoint.every_minutes=null",
        "checkpoint.every_epochs=100000",
        "knn.every_epochs=null",
        "train.epochs=100000",
        *options.set,
    ]
    return load_config(shipped, overrides)


def start(options: argparse.Namespace, banks: Sequence[tuple[int, str]]) -> dict[tuple[str, int | None], Process]:
    """Start the processes of all variants; return them by name and capacity of the bank."""
    found: dict[tuple[str, int | None], Process] = {}

    def begin(variant: str, capacity: int | None, config: Config) -> None:
        print(f"starting {variant}{f', bank of {capacity:,}' if capacity else ''}", file=sys.stderr)
        settings = {"variant": variant, "workers": options.workers, "steps": options.steps}
        found[variant, capacity] = Process(settings | {"config": config.model_dump(mode="json")})

    try:
        begin("ceiling", None, make_config(options, *banks[0]))
        for capacity, kind in banks:
            begin("authors", capacity, make_config(options, capacity, kind))
            begin("ours", capacity, make_config(options, capacity, kind))
    except BaseException:
        for process in found.values():
            process.end()
        raise
    return found


def measure(options: argparse.Namespace, banks: Sequence[tuple[int, str]]) -> list[Result]:
    """Run all rounds and return the rows of the table."""
    processes = start(options, banks)
    times: dict[tuple[str, int | None], list[float]] = {key: [] for key in processes}
    order, drawn = list(processes), random.Random(0)
    try:
        for number in range(options.rounds + 1):
            drawn.shuffle(order)
            for key in order:
                seconds = processes[key].run(options.steps)
                if number:  # the first warms up
                    times[key].append(seconds)
                print(f"round {number}  {key[0]:8} {key[1] or '':>9}  {seconds:.3f} s per step", file=sys.stderr)
    finally:
        for process in processes.values():
            process.end()
    kinds = dict(banks)
    return [
        Result(
            variant,
            capacity,
            kinds[capacity] if capacity and variant == "ours" else None,
            statistics.median(found),
            options.batch / statistics.median(found),
            ratio(times["authors", capacity], found) if capacity else None,
            ratio(times["ceiling", None], found),
            found,
        )
        for (variant, capacity), found in times.items()
    ]


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def parse_bank(text: str) -> tuple[int, str]:
    """Parse CAPACITY:KIND, for example 1048576:ivf or 1048576:scan-bf16."""
    capacity, _, kind = text.partition(":")
    return int(capacity), kind or "flat"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("data", type=Path, help="Parquet file of images")
    parser.add_argument("--banks", type=parse_bank, nargs="+", default=[(131_072, "flat"), (1_048_576, "ivf")])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps per turn")
    parser.add_argument("--workers", type=int, default=2, help="workers of the authors' loop")
    parser.add_argument("--our-workers", default="auto")
    parser.add_argument(
        "--precision", default="bfloat16", help="precision of msf-faiss and the ceiling; the authors' loop uses float32"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--set", action="append", default=[], help="further settings of our config")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    results = measure(options, options.banks)
    print(
        f"{options.setting}, batch {options.batch}, {options.precision}, {options.workers} workers of the authors' loop"
    )
    print(f"{'':8} {'bank':>9} {'kind':>10} {'s/step':>9} {'images/s':>9} {'faster':>7} {'of ceiling':>10}")
    for row in results:
        faster = f"{row.faster_than_authors:6.2f}x" if row.faster_than_authors else ""
        print(
            f"{row.variant:8} {row.bank or '':>9} {row.kind or '':>10} {row.seconds:9.3f} {row.images_per_second:9.1f} "
            f"{faster:>7} {row.share_of_ceiling:10.1%}"
        )
    if options.json:
        found = machine(options.device) | {"results": [asdict(row) for row in results]}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
