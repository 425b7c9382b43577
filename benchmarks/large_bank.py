"""Measure time and memory of a bank of millions on one machine.

    python benchmarks/large_bank.py [--size 4194304] [--dtype bfloat16] [--steps 200] [--json FILE]

Fills an inverted file with clustered vectors in chunks (only the bank stores all of them), then times steps of push,
search and mean, and compares some results with an exact search of the ring. The memory printed is the peak resident
memory of the process, including torch and FAISS (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bank_data import Clustered
from bank_meters import machine, peak_resident, recall

from msf_faiss.bank import create_bank
from msf_faiss.config import IvfBankConfig, IvfConfig
from msf_faiss.search.faiss_setup import set_threads


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", type=int, default=4_194_304, help="entries")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--segments", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checks", type=int, default=5, help="exact searches of 64 queries, spread over the steps")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--fill-batch", type=int, default=4_096, metavar="M", help="vectors per push while filling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    source = Clustered(options.dim, options.seed)
    config = IvfBankConfig(
        capacity=options.size, dtype=options.dtype, k=options.k, ivf=IvfConfig(segments=options.segments)
    )
    bank = create_bank(config, dim=options.dim)
    whole = options.size + options.size // 8  # by then, an index that is built during pushes exists
    started = time.perf_counter()
    while bank.pushed < whole:
        count = min(options.fill_batch, whole - bank.pushed)
        bank.push(source.draw(count), torch.arange(bank.pushed, bank.pushed + count))
        if bank.pushed % (1 << 20) == 0:
            print(f"{bank.pushed:,} of {whole:,} pushed", file=sys.stderr, flush=True)
    fill_seconds = time.perf_counter() - started
    times, recalls = [], []
    for step in range(1, options.steps + 1):
        vectors, ids = source.draw(options.batch), torch.arange(bank.pushed, bank.pushed + options.batch)
        began = time.perf_counter()
        bank.push(vectors, ids)
        found = bank.search(vectors, options.k)
        bank.mean_of(found.slots)
        times.append(1000 * (time.perf_counter() - began))
        if step % max(1, options.steps // options.checks) == 0:
            queries, own = vectors[:64], ids[:64] % options.size
            more = options.k + 1
            exact = bank.search_exactly(queries, more)
            recalls.append(recall(bank.search(queries, more).slots, exact.slots, own, options.k))
    report = {
        **machine(),
        **{
            name: getattr(options, name)
            for name in ("size", "dtype", "segments", "steps", "batch", "dim", "k", "threads")
        },
        "peak_resident_bytes": peak_resident(),
        "fill_seconds": fill_seconds,
        "step_ms_median": statistics.median(times),
        "step_ms_p95": statistics.quantiles(times, n=20)[-1],
        "step_ms_max": max(times),
        "recalls": recalls,
        "bank_metrics": bank.metrics(),
    }
    print(f"{bank}")
    print(
        f"peak memory of the process {report['peak_resident_bytes'] / 2**30:.2f} GiB, filled in {fill_seconds:,.0f} s"
    )
    print(
        f"{options.steps} steps of {options.batch}: median {report['step_ms_median']:.1f} ms, "
        f"p95 {report['step_ms_p95']:.1f}, maximum {report['step_ms_max']:.1f}"
    )
    print(f"recall@{options.k}, own entry excluded: {', '.join(f'{value:.4f}' for value in recalls)}")
    print(", ".join(f"{name} {value:g}" for name, value in report["bank_metrics"].items()))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
