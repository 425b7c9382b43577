"""Measure the recall of banks while the encoder changes.

    python benchmarks/drift.py [--size 262144] [--cosines 0.7 0.3] [--rotations 3] [--json FILE]

The centres of clustered data (`bank_data.Clustered`) move towards other centres. Over one rotation of the bank (as many
pushed vectors as it has slots), the cosine of each centre with its position at the start of the rotation falls to the
given value; each rotation moves them in a new direction. Several times per rotation, every bank is searched with the
vectors pushed last and compared with an exact search of its ring. No bank is adjusted after these checks.

The first row is an index that is only updated: FAISS's inverted file of 8-bit codes with the initial centroids, and its
shortlist re-ranked from the ring.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bank_data import CLASSES, Clustered
from bank_meters import machine, recall
from torch import Tensor
from torch.nn.functional import normalize

from msf_faiss.bank import Bank, create_bank
from msf_faiss.bank.ring import RingBank, RingSpec
from msf_faiss.config import BankConfig, IvfBankConfig, IvfConfig, ScanBankConfig
from msf_faiss.search.canonical import rescore
from msf_faiss.search.exact import search_exactly
from msf_faiss.search.faiss_engines import default_engine
from msf_faiss.search.faiss_setup import faiss, set_threads
from msf_faiss.search.neighbors import Neighbors

_CPU = torch.device("cpu")
_CHUNK = 16_384
_SHORTLIST = 2  # times k + 1, as in the trial


class FrozenIvf(RingBank):
    """An inverted file whose centroids are frozen when the ring is first full.

    Args:
        probes: lists to search per query.
    """

    def __init__(self, capacity: int, dim: int, *, probes: int = 16) -> None:
        super().__init__(RingSpec(capacity, dim))
        lists = 2 ** round(math.log2(4 * math.sqrt(capacity)))
        self._index: Any = None
        self._lists, self._probes = min(lists, capacity // 40), probes

    def _written(self, start: int, stop: int) -> None:
        if self._index is not None:
            self._index.update_vectors(torch.arange(start, stop).numpy(), self._entries[start:stop].numpy())
        elif self._pushed >= self.capacity and stop == self.capacity:
            quantizer = faiss.IndexFlatIP(self.dim)
            kind = faiss.ScalarQuantizer.QT_8bit
            metric = faiss.METRIC_INNER_PRODUCT
            index = faiss.IndexIVFScalarQuantizer(quantizer, self.dim, self._lists, kind, metric, False)
            index.cp.spherical = True
            index.train(self._entries[: 40 * self._lists].numpy())
            index.add(self._entries.numpy())
            index.set_direct_map_type(faiss.DirectMap.Array)
            index.nprobe = self._probes
            self._quantizer, self._index = quantizer, index  # keeps the quantiser alive; the index does not own it

    def _search(self, queries: Tensor, k: int) -> Neighbors:
        wanted = _SHORTLIST * k
        slots = torch.from_numpy(self._index.search(queries.numpy(), wanted)[1])  # [B, C]
        # If the probed lists have too few entries, FAISS returns -1; here the query's own list has far more.
        assert int(slots.min()) >= 0
        return rescore(queries, self._entries, slots, self.age(slots), k)


ROWS: dict[str, BankConfig | None] = {
    "frozen quantiser": None,
    "ivf": IvfBankConfig(ivf=IvfConfig()),
    "ivf segments=4": IvfBankConfig(ivf=IvfConfig(segments=4)),
    "ivf segments=8": IvfBankConfig(ivf=IvfConfig(segments=8)),
    "scan pq": ScanBankConfig(scan="pq"),
    "scan int8": ScanBankConfig(scan="int8"),
}


class Drift:
    """Clustered vectors whose centres move.

    Args:
        source: generator of the vectors.
        period: vectors per rotation.
        cosine: of a centre at the end of a rotation with its position at the start.
    """

    def __init__(self, source: Clustered, period: int, cosine: float) -> None:
        self._source, self._period, self._angle = source, period, math.acos(cosine)
        self._drawn = 0

    def draw(self, count: int) -> Tensor:
        """Move the centres, and return the next vectors, [M, D]."""
        if self._drawn % self._period < count:
            self._from = self._source.centres
            other = self._source.fresh_centres()
            along = (other * self._from).sum(dim=1, keepdim=True) * self._from
            self._towards = normalize(other - along, dim=1)  # [C, D], orthogonal to the current centres
        angle = self._angle * (self._drawn % self._period + count) / self._period
        self._drawn += count
        self._source.centres = math.cos(angle) * self._from + math.sin(angle) * self._towards
        return self._source.draw(count)


def measure(cosine: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one dict per row and rotation."""
    source = Clustered(options.dim, options.seed)
    banks: dict[str, Bank] = {name: _bank(name, options) for name in options.rows}
    pushed = 0
    while pushed < options.size:
        count = min(_CHUNK, options.size - pushed)
        vectors, ids = source.draw(count), torch.arange(pushed, pushed + count)
        for bank in banks.values():
            bank.push(vectors, ids)
        pushed += count
    # Indexes that are built during pushes exist after a quarter of a rotation without drift.
    for _ in range(options.size // 4 // options.batch):
        vectors, ids = source.draw(options.batch), torch.arange(pushed, pushed + options.batch)
        for bank in banks.values():
            bank.push(vectors, ids)
        pushed += options.batch
    steps = options.size // options.batch
    drift = Drift(source, steps * options.batch, cosine)
    found = []
    for rotation in range(1, options.rotations + 1):
        pushes: dict[str, list[float]] = {name: [] for name in banks}
        searches: dict[str, list[float]] = {name: [] for name in banks}
        recalls: dict[str, list[float]] = {name: [] for name in banks}
        for step in range(1, steps + 1):
            vectors, ids = drift.draw(options.batch), torch.arange(pushed, pushed + options.batch)
            for name, bank in banks.items():
                pushes[name].append(_milliseconds(lambda: bank.push(vectors, ids))[1])  # noqa: B023 - called at once
            pushed += options.batch
            if step % max(1, steps // options.checks) == 0:
                own = ids % options.size
                exact = _exact(next(iter(banks.values())), vectors, options.k + 1)
                for name, bank in banks.items():
                    answer, took = _milliseconds(lambda: bank.search(vectors, options.k + 1))  # noqa: B023
                    searches[name].append(took)
                    recalls[name].append(recall(answer.slots, exact, own, options.k))
        for name in banks:
            found.append(
                {
                    "cosine": cosine,
                    "rotation": rotation,
                    "row": name,
                    "recall_min": min(recalls[name]),
                    "recall_mean": statistics.fmean(recalls[name]),
                    "search_ms": statistics.median(searches[name]),
                    "push_ms": statistics.fmean(pushes[name]),
                    "push_ms_max": max(pushes[name]),
                    "bank_metrics": banks[name].metrics(),
                }
            )
            shown = found[-1]
            print(
                f"cosine {cosine}, rotation {rotation}, {name}: {shown['recall_min']:.3f}", file=sys.stderr, flush=True
            )
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """Format a line per cosine and row: recall (minimum, mean) per rotation, then milliseconds of the last rotation."""
    lines = []
    for cosine in dict.fromkeys(each["cosine"] for each in found):
        rows = [each for each in found if each["cosine"] == cosine]
        rotations = sorted({each["rotation"] for each in rows})
        heads = "".join(f"{f'rotation {number}':>16}" for number in rotations)
        lines += [f"\ncosine {cosine} over a rotation", f"{'':18}{heads}{'search':>9}{'push':>8}{'max':>9}"]
        for name in dict.fromkeys(each["row"] for each in rows):
            own = [each for each in rows if each["row"] == name]
            recalls = "".join(f"{each['recall_min']:>9.3f} {each['recall_mean']:.3f} " for each in own)
            last = own[-1]
            lines.append(
                f"{name:18}{recalls}{last['search_ms']:>9.1f}{last['push_ms']:>8.2f}{last['push_ms_max']:>9.1f}"
            )
    return "\n".join(lines).lstrip("\n")


def _bank(name: str, options: argparse.Namespace) -> Bank:
    config = ROWS[name]
    if config is None:
        return FrozenIvf(options.size, options.dim)
    return create_bank(config.model_copy(update={"capacity": options.size, "k": options.k}), dim=options.dim)


def _exact(bank: Bank, queries: Tensor, count: int) -> Tensor:
    ring = bank.state_dict()["embeddings"]  # the same for every bank
    return search_exactly(default_engine(_CPU), queries, ring, [(0, ring.shape[0])], bank.age, count).slots


def _milliseconds(work: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    answer = work()
    return answer, 1000 * (time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", type=int, default=262_144, help="entries of each bank")
    parser.add_argument("--cosines", type=float, nargs="+", default=[0.7, 0.3])
    parser.add_argument("--rotations", type=int, default=3)
    parser.add_argument("--checks", type=int, default=8, help="checks per rotation")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=5, help="neighbours, without the own entry")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--rows", type=lambda text: text.split(","), default=list(ROWS), help=f"choose from {', '.join(ROWS)}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if unknown := [row for row in options.rows if row not in ROWS]:
        parser.error(f"unknown rows: {', '.join(unknown)}; choose from {', '.join(ROWS)}")
    set_threads(options.threads)
    found = [each for cosine in options.cosines for each in measure(cosine, options)]
    print(f"recall@{options.k} of {CLASSES:,} moving classes, minimum and mean of the checks of each rotation;")
    print(f"milliseconds in the last rotation: search (median) and push (mean, maximum) of {options.batch} vectors\n")
    print(table(found))
    if options.json:
        settings = {name: getattr(options, name) for name in ("size", "batch", "dim", "k", "threads", "seed", "checks")}
        options.json.write_text(json.dumps({**machine(), **settings, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
