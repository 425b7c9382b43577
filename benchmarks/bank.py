"""Compare the bank step (push, search, mean of the neighbours) of msf-faiss with other implementations.

    python benchmarks/bank.py [--sizes 131072 1048576] [--data clustered,hard] [--json FILE] [--chart FILE]

Each round times every row once, in a new random order, on the same new vectors. Milliseconds are medians over the
rounds, ratios are medians of the ratios of each round. Rows that do not fit into memory together run in groups. Each
group repeats the authors' step and FAISS's search, so that every ratio is within a group. A legend is printed below the
table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from bank_chart import draw_chart
from bank_data import Clustered, Embeddings, Hard, Source
from bank_meters import ceilings, machine, memory_in_use, peak_extra, recall, wait
from bank_rows import OURS, PLAIN, ROWS, YARDSTICKS, Ours, PlainRing, Row
from torch import Tensor

from msf_faiss.bank.capacity import bytes_per_entry
from msf_faiss.search.exact import search_exactly
from msf_faiss.search.faiss_engines import default_engine
from msf_faiss.search.faiss_setup import faiss, set_threads

_SEPARATE = ("lightly",)  # finds one neighbour, the query itself, so recall is undefined

LEGEND = """\
step, push, search, mean: milliseconds of wall time, medians. faster: authors' step / this step. cost: this step /
FAISS's search alone. recall: fraction of the k nearest neighbours of each new vector, its own entry excluded, that the
row finds, compared with an exact search of the same ring. bytes: memory per entry freed by deleting the bank (other
implementations: of the shared ring). extra: peak memory of search and mean beyond the memory in use. limit: lower bound
of the search time from the ceilings measured in this run (the larger of arithmetic and reading) / actual time."""


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    data: str
    size: int
    row: str
    group: int  # rows of a group took turns
    rounds: int
    step_ms: float
    push_ms: float
    search_ms: float
    mean_ms: float
    faster_than_authors: float | None
    cost_of_faiss: float | None
    recall: float | None
    bytes_per_entry: float | None
    peak_extra_bytes: int | None
    share_of_limit: float | None
    bank_metrics: dict[str, float]


@dataclass(frozen=True)
class Times:
    """Milliseconds of the parts of a row's step in a round."""

    push: float
    search: float
    mean: float

    @property
    def step(self) -> float:
        return self.push + self.search + self.mean


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def groups_of(rows: Sequence[str], sizes: dict[str, float], budget: float) -> list[list[str]]:
    """Split rows into groups that fit into memory; YARDSTICKS are in each group.

    Args:
        rows: names, in the order of the table.
        sizes: bytes of each row with a bank of its own; key "" gives the bytes that every group needs in addition.
        budget: bytes that a group may use.
    """
    shared = [row for row in rows if row in YARDSTICKS]
    groups, used = [[row for row in rows if row not in sizes]], sizes[""]
    for row in rows:
        if row in sizes:
            if used + sizes[row] > budget and used > sizes[""]:
                groups.append(list(shared))
                used = sizes[""]
            groups[-1].append(row)
            used += sizes[row]
    return groups


class Group:
    """Rows that take turns on rings with the same content."""

    def __init__(self, names: Sequence[str], size: int, source: Source, options: argparse.Namespace) -> None:
        self._options, self._source, self._size = options, source, size
        self._device = torch.device(options.device)
        ring = None
        if any(name in PLAIN for name in names):
            ring = PlainRing(size, options.dim, getattr(torch, options.dtype), self._device)
        self.rows: dict[str, Row] = {}
        for name in names:
            if name in PLAIN:
                assert ring is not None
                self.rows[name] = PLAIN[name](ring)
            else:
                self.rows[name] = Ours(OURS[name](options.dtype, size, options.k), options.dim, self._device)
        self._ring = ring
        self._pushed = 0
        self.times: dict[str, list[Times]] = {name: [] for name in names}
        self.recalls: dict[str, list[float]] = {name: [] for name in names}

    def fill(self) -> None:
        """Push an eighth more than the capacity, so that all indexes are built and the head is inside the ring."""
        whole = self._size + self._size // 8
        while self._pushed < whole:
            count = min(self._options.fill_batch, whole - self._pushed, self._size)
            vectors, ids = self._next(count)
            if self._ring is not None:
                self._ring.write(vectors, self._pushed)
            for row in self.rows.values():
                if isinstance(row, Ours):
                    row.push(vectors, ids, self._pushed)
            self._pushed += count

    def round(self, order: Sequence[str], *, keep: bool) -> None:
        """Run every row's step on the same new vectors; then measure recall untimed (once for `PLAIN`)."""
        options = self._options
        vectors, ids = self._next(options.batch)
        if self._ring is not None:
            self._ring.write(vectors, self._pushed)  # for rows that only search
        for name in order:
            row = self.rows[name]
            moments = [self._now()]
            row.push(vectors, ids, self._pushed)
            moments.append(self._now())
            slots = row.search(vectors, options.k)
            moments.append(self._now())
            row.mean(slots)
            moments.append(self._now())
            if keep:
                parts = [1000 * (stop - start) for start, stop in pairwise(moments)]
                self.times[name].append(Times(*parts))
        self._pushed += options.batch
        if keep:
            self._check(vectors, ids % self._size)

    def results(self, data: str, number: int, limits: dict[str, float]) -> list[Result]:
        """Return the results; deletes the rows to measure their memory."""
        queries = self._next(self._options.batch)[0]
        found = []
        for name in list(self.rows):
            row, times = self.rows[name], self.times[name]
            extra = peak_extra(lambda row=row: row.mean(row.search(queries, self._options.k)), self._device)  # type: ignore[misc]
            work = row.work(self._options.batch)
            search_ms = statistics.median(each.search for each in times)
            share = None
            if work is not None and work.precision in limits:
                seconds = max(work.flops / limits[work.precision], work.read / limits["read"])
                share = 1000 * seconds / search_ms
            steps = {
                each: [time.step for time in self.times[each]] for each in (name, *YARDSTICKS) if each in self.times
            }
            bank_metrics = row.bank.metrics() if isinstance(row, Ours) else {}
            size = self._size_of(name, row)
            del row
            found.append(
                Result(
                    data=data,
                    size=self._size,
                    row=name,
                    group=number,
                    rounds=len(times),
                    step_ms=statistics.median(steps[name]),
                    push_ms=statistics.median(each.push for each in times),
                    search_ms=search_ms,
                    mean_ms=statistics.median(each.mean for each in times),
                    faster_than_authors=median_ratio(steps["authors"], steps[name]) if "authors" in steps else None,
                    cost_of_faiss=median_ratio(steps[name], steps["faiss"]) if "faiss" in steps else None,
                    recall=statistics.fmean(self.recalls[name]) if self.recalls[name] else None,
                    bytes_per_entry=size,
                    peak_extra_bytes=extra,
                    share_of_limit=share,
                    bank_metrics=bank_metrics,
                )
            )
        return found

    def _size_of(self, name: str, row: Row) -> float | None:
        if not isinstance(row, Ours):
            return float(row.ring.shape[1] * row.ring.element_size())
        before = memory_in_use(self._device)
        del self.rows[name], row.bank
        after = memory_in_use(self._device)
        return None if before is None or after is None else (before - after) / self._size

    def _check(self, vectors: Tensor, own: Tensor) -> None:
        exact: dict[torch.dtype, Tensor] = {}  # by dtype: rings of the same dtype have the same content
        count = min(self._options.k + 1, self._size)
        for name, row in self.rows.items():
            if name in _SEPARATE or (name in PLAIN and self.recalls[name]):
                continue
            ring = row.ring
            if ring.dtype not in exact:
                ages = lambda slots: (self._pushed - 1 - slots) % self._size  # noqa: E731
                queries = vectors.to(ring.dtype)
                everything = [(0, self._size)]
                exact[ring.dtype] = search_exactly(
                    default_engine(self._device), queries, ring, everything, ages, count
                ).slots
            found = row.search(vectors, count)
            self.recalls[name].append(recall(found, exact[ring.dtype], own, self._options.k))
            if name == "authors":
                row.mean(found)  # releases its clone

    def _next(self, count: int) -> tuple[Tensor, Tensor]:
        vectors = self._source.draw(count).to(self._device)
        return vectors, torch.arange(self._pushed, self._pushed + count, device=self._device)

    def _now(self) -> float:
        wait(self._device)
        return time.perf_counter()


def measure(data: str, size: int, options: argparse.Namespace, limits: dict[str, float]) -> list[Result]:
    """Measure all rows on one kind of data with one size of the ring."""
    plain = size * options.dim * torch.empty(0, dtype=getattr(torch, options.dtype)).element_size()
    matrix = options.batch * size * 4
    sizes = {
        name: size * bytes_per_entry(OURS[name](options.dtype, size, options.k), options.dim)
        for name in options.rows
        if name in OURS
    }
    # The largest of the plain rows: two copies of the ring, or one copy and three [B, N] matrices.
    needed = plain + max(2 * plain + matrix, plain + 3 * matrix) if any(row in PLAIN for row in options.rows) else 0.0
    groups = groups_of(options.rows, {"": needed, **sizes}, options.memory * 2**30)
    rounds = options.rounds or max(5, min(15, 2**21 // size))
    found = []
    for number, names in enumerate(groups, start=1):
        progress(f"{data}, {size:,} entries, group {number} of {len(groups)}: {', '.join(names)}")
        group = Group(names, size, _source(data, options), options)
        group.fill()
        shuffled = random.Random(options.seed)
        for round_number in range(rounds + 1):
            started = time.perf_counter()
            order = shuffled.sample(names, len(names))
            group.round(order, keep=round_number > 0)  # the first warms up
            took = time.perf_counter() - started
            if round_number <= 1:  # the first timed round predicts the time of the others
                progress(f"  {rounds - round_number} rounds to go, about {took * (rounds - round_number):,.0f} s")
        found += group.results(data, number, limits)
    first_of: dict[str, Result] = {}
    for result in found:
        first_of.setdefault(result.row, result)  # show the first of the repeated yardsticks
    return [first_of[name] for name in options.rows]


def table(results: Sequence[Result], *, markdown: bool) -> str:
    """Format the results, one block per kind of data and size."""
    head = ["row", "step", "push", "search", "mean", "faster", "cost", "recall", "bytes", "extra MiB", "limit"]
    blocks = []
    for data, size in dict.fromkeys((result.data, result.size) for result in results):
        lines = [head]
        for each in (result for result in results if (result.data, result.size) == (data, size)):
            extra = None if each.peak_extra_bytes is None else each.peak_extra_bytes / 2**20
            times = (each.step_ms, each.push_ms, each.search_ms, each.mean_ms)
            lines.append(
                [
                    each.row,
                    *(f"{value:,.1f}" for value in times),
                    _text(each.faster_than_authors, "{:,.1f} ×"),
                    _text(each.cost_of_faiss, "{:.3f}"),
                    _text(each.recall, "{:.4f}"),
                    _text(each.bytes_per_entry, "{:,.0f}"),
                    _text(extra, "{:,.0f}"),
                    _text(each.share_of_limit, "{:.0%}"),
                ]
            )
        blocks.append(f"{data}, {size:,} entries\n\n{_aligned(lines, markdown=markdown)}")
    return "\n\n".join(blocks)


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _aligned(lines: Sequence[Sequence[str]], *, markdown: bool) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [
        [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line) for line in padded)
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def _source(data: str, options: argparse.Namespace) -> Source:
    match data:
        case "clustered":
            return Clustered(options.dim, options.seed)
        case "hard":
            return Hard(options.dim, options.seed)
        case _:
            return Embeddings(options.embeddings, options.seed)


def progress(text: str) -> None:
    """Print to stderr, so that stdout has only the table."""
    print(text, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[131_072, 1_048_576], metavar="N", help="entries")
    parser.add_argument("--batch", type=int, default=256, help="vectors pushed and searched per step")
    parser.add_argument("--dim", type=int, default=512, help="dimensions; --embeddings sets them")
    parser.add_argument("--k", type=int, default=5, help="neighbours, including the query's own entry")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch and of FAISS")
    parser.add_argument("--rounds", type=int, help="default: 5 to 15, fewer for large rings")
    parser.add_argument("--data", type=_names, default=["clustered", "hard"], help="choose from clustered, hard")
    parser.add_argument("--embeddings", type=Path, metavar="FILE", help=".npy file of [n, D] floats, instead of --data")
    parser.add_argument("--rows", type=_names, default=list(ROWS), help=f"choose from {', '.join(ROWS)}")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="dtype of the rings"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--memory", type=float, default=14.0, metavar="GIB", help="memory that a group of rows may use")
    parser.add_argument("--fill-batch", type=int, default=16_384, metavar="M", help="vectors per push while filling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--chart", type=Path, metavar="FILE", help=".png or .svg file of time against N")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(arguments)
    if unknown := [row for row in options.rows if row not in ROWS]:
        parser.error(f"unknown rows: {', '.join(unknown)}; choose from {', '.join(ROWS)}")
    if unknown := [data for data in options.data if data not in ("clustered", "hard")]:
        parser.error(f"unknown data: {', '.join(unknown)}; choose from clustered, hard")
    if options.embeddings:
        options.data, options.dim = [options.embeddings.stem], Embeddings(options.embeddings, 0).dim
    if options.device == "cpu" and options.dtype != "float32" and "faiss" in options.rows:
        parser.error("on the CPU, FAISS reads only float32: pass --rows without faiss, or --dtype float32")
    if min(options.sizes) < options.k + 1 + options.batch:
        parser.error("--sizes must be at least batch + k + 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    set_threads(options.threads)
    limits = ceilings(torch.device(options.device), options.batch, options.dim)
    results = []
    for data in options.data:
        for size in options.sizes:
            results += measure(data, size, options, limits)
            if options.json:  # after every block, in case a long run is interrupted
                settings = {name: getattr(options, name) for name in ("batch", "dim", "k", "dtype", "seed", "threads")}
                found = [asdict(each) for each in results]
                report = {**machine(options.device), **settings, "ceilings": limits, "results": found}
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(results, markdown=options.markdown))
    print(f"\n{LEGEND}")
    shown = ", ".join(
        f"{name} {value / 1e9:,.0f} G{'B' if name == 'read' else 'FLOP'}/s" for name, value in limits.items()
    )
    print(f"ceilings: {shown}; {options.threads} threads, torch {torch.__version__}, FAISS {faiss.__version__}")
    if options.chart:
        draw_chart([asdict(each) for each in results], options.chart, options.batch, options.dim)


if __name__ == "__main__":
    main()
