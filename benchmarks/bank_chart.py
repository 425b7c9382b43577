"""Draw milliseconds per step against the number of entries, on logarithmic axes.

    python benchmarks/bank_chart.py CHART FILE...

Each FILE is from `bank.py --json` and may have some of the sizes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's colours, safe for colour blindness; other implementations are gray and dashed.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8B6F00")
_OTHERS = ("authors", "torch", "lightly", "faiss")
_GREYS = ("#333333", "#666666", "#888888", "#4A4A4A")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_LABEL_STEP = 0.052  # minimum distance between two labels, as a fraction of the axis


def draw_chart(results: Sequence[Mapping[str, Any]], path: Path, batch: int, dim: int) -> None:
    """Write a .png or .svg file with one panel per kind of data.

    Args:
        results: `bank.Result` as dicts.
        path: file to write.
        batch: vectors per step, for the title.
        dim: dimensions, for the title.
    """
    kinds = list(dict.fromkeys(each["data"] for each in results))
    rows = list(dict.fromkeys(each["row"] for each in results))
    ours = [row for row in rows if row not in _OTHERS]
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(6.4 * len(kinds), 4.8), dpi=160, facecolor="white", layout="constrained")
        axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        sizes = sorted({each["size"] for each in results})
        times = [each["step_ms"] for each in results]
        low, high = math.log10(min(times)) - 0.15, math.log10(max(times)) + 0.15
        for panel, kind in zip(axes, kinds, strict=True):
            ends: list[tuple[float, str, str]] = []
            dashes: Any
            for row in rows:
                points = sorted((e["size"], e["step_ms"]) for e in results if (e["data"], e["row"]) == (kind, row))
                if not points:
                    continue
                if row in ours:
                    colour, dashes, width = _COLOURS[ours.index(row) % len(_COLOURS)], "-", 2.0
                else:
                    place = _OTHERS.index(row)
                    colour, dashes, width = _GREYS[place], _DASHES[place], 1.2
                panel.plot(*zip(*points, strict=True), color=colour, ls=dashes, lw=width, marker="o", ms=3.5)
                ends.append((points[-1][1], row, colour))
            for (_, row, colour), height in zip(*_apart(ends, low, high), strict=True):
                name = {"authors": "authors' step", "torch": "torch mm + topk", "faiss": "FAISS's search alone"}
                panel.text(1.02, height, name.get(row, row), color=colour, va="center", transform=panel.transAxes)
            panel.set(
                xscale="log", yscale="log", xlabel="entries of the bank", title=f"{kind} data", ylim=(10**low, 10**high)
            )
            panel.set_xticks(sizes, [_short(size) for size in sizes])
            panel.minorticks_off()
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.grid(color="#E4E4E4", lw=0.6)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("milliseconds per step")
        figure.suptitle(f"Push, search and mean of {batch} vectors of {dim} dimensions", fontsize=10)
        figure.savefig(path)


def _apart(
    ends: list[tuple[float, str, str]], low: float, high: float
) -> tuple[list[tuple[float, str, str]], list[float]]:
    """Return the ends of the lines from below, and label heights (fractions of the axis) that do not overlap."""
    ends = sorted(ends)
    heights: list[float] = []
    for value, _, _ in ends:
        wanted = (math.log10(value) - low) / (high - low)
        heights.append(max(wanted, heights[-1] + _LABEL_STEP) if heights else wanted)
    over = heights[-1] - 0.99
    for place in range(len(heights) - 1, -1, -1):  # push labels above the top down again
        if over <= 0:
            break
        heights[place] = min(heights[place], 0.99 - _LABEL_STEP * (len(heights) - 1 - place))
    return ends, heights


def _short(size: int) -> str:
    for unit, factor in (("M", 2**20), ("K", 2**10)):
        if size >= factor:
            return f"{size / factor:g}{unit}"
    return str(size)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("chart", type=Path, help=".png or .svg file")
    parser.add_argument("files", type=Path, nargs="+", help="written by bank.py --json")
    options = parser.parse_args(arguments)
    reports = [json.loads(path.read_text()) for path in options.files]
    shapes = {(report["batch"], report["dim"]) for report in reports}
    if len(shapes) > 1:
        parser.error(f"the files have different batch sizes and dimensions: {sorted(shapes)}")
    draw_chart([each for report in reports for each in report["results"]], options.chart, *shapes.pop())


if __name__ == "__main__":
    main()
