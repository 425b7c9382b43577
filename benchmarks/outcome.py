"""Print a SHA-256 of the outcome of training, to show that a refactoring changes no bit of it.

    python benchmarks/outcome.py            (about ten minutes on two cores; --only demo --only ivf for some cases)

Each case is a run of the command line in a temporary folder. Its digest covers all tensors of model, optimizer and bank
in the last checkpoint, sorted by file and name. Run it before and after a change, on the same machine.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

SHORT = ["--set", "train.max_steps=96"]
RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CASES: dict[str, list[str]] = {
    "demo": [],
    "resumed": [],  # the same run, ended by SIGTERM half-way and resumed
    "flat": SHORT,
    "reference": [*SHORT, "--set", "bank.kind=reference"],
    "scan bf16": [*SHORT, "--set", "bank.kind=scan", "--set", "bank.scan=bf16"],
    "scan int8": [*SHORT, "--set", "bank.kind=scan", "--set", "bank.scan=int8"],
    "scan pq": [*SHORT, "--set", "bank.kind=scan", "--set", "bank.scan=pq", "--set", "bank.capacity=8192"],
    "ivf": [*SHORT, "--set", "bank.kind=ivf"],
    "two ranks, replicated": [*SHORT, "--set", "bank.placement=replicated"],
    "two ranks, sharded": [*SHORT, "--set", "bank.placement=sharded"],
}


def digest(run_dir: Path) -> str:
    """Return the SHA-256 of names, shapes, dtypes and bytes of all tensors in the last checkpoint."""
    last = max(path for path in (run_dir / "checkpoints").iterdir() if path.name.startswith("step-"))
    total = hashlib.sha256()
    for path in sorted(last.glob("*.safetensors")):
        if not path.name.startswith(("model", "optimizer", "bank")):
            continue
        for name, tensor in sorted(safetensors.torch.load_file(path).items()):
            total.update(f"{path.stem} {name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def train(run_dir: Path, settings: list[str], *, ranks: bool, end_at: int | None = None) -> None:
    """Run `pretrain demo`; with `end_at`, send SIGTERM once status.json reports that step."""
    command = [sys.executable, *(RANKS if ranks else []), "-m", "msf_faiss_cli", "pretrain", "demo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if ranks else None
    with subprocess.Popen(
        [*command, "--out", str(run_dir), *settings],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        if end_at is not None:
            while process.poll() is None and _step(run_dir) < end_at:
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    if process.returncode != (0 if end_at is None else 75):
        sys.exit(f"{' '.join(command)} {' '.join(settings)}: exit code {process.returncode}\n{errors}")


def _step(run_dir: Path) -> int:
    try:
        return int(json.loads((run_dir / "status.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CASES, metavar="CASE", help="repeatable")
    chosen = parser.parse_args().only
    total = hashlib.sha256()
    for name, settings in CASES.items():
        if chosen and name not in chosen:
            continue
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            if name == "resumed":
                train(run_dir, settings, ranks=False, end_at=600)
            train(run_dir, settings, ranks=name.startswith("two ranks"))
            found = digest(run_dir)
        total.update(found.encode())
        print(f"{found}  {name}", flush=True)
    print(f"{total.hexdigest()}  all of them")


if __name__ == "__main__":
    main()
