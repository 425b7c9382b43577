"""`msf-faiss results`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from msf_faiss.evaluate.comparison import Comparison

_EXTENSIONS = {".html", ".png"}


@click.command
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the results with their protocols as JSON.")
def command(run: Path, as_json: bool) -> None:
    """Show all evaluation results of a run.

    RUN is a run directory. Tables compare the trained with the untrained network, if both were evaluated (--encoder
    online --encoder untrained). Pages of inspect-neighbors are listed too.
    """
    from msf_faiss.errors import UserError
    from msf_faiss.evaluate.comparison import compare
    from msf_faiss.evaluate.results import FOLDER, load_results
    from msf_faiss.files import kind_of

    from .console import stdout

    if kind_of(run) != "folder":
        raise UserError(f"{run}: no such run directory")
    results = load_results(run / FOLDER)
    pages = sorted(path for path in (run / "neighbors").glob("*") if path.suffix in _EXTENSIONS)
    if as_json:
        content = {
            "run": str(run),
            "results": [result.to_json() for result in results],
            "neighbor_pages": [str(path) for path in pages],
        }
        click.echo(json.dumps(content, indent=2))
        return
    if not results and not pages:
        raise UserError(f"{run}: no results yet; run `msf-faiss eval-knn {run} --encoder online --encoder untrained`")
    print_comparisons(str(run), compare(results))
    for path in pages:
        stdout().print(f"neighbours: {path}", markup=False)


def print_comparisons(name: str, comparisons: Sequence[Comparison]) -> None:
    """Print a table for each comparison, one row per metric and one column per encoder, and then a legend."""
    from .console import stdout

    console = stdout()
    for comparison in comparisons:
        console.print(_heading(name, comparison), markup=False)
        console.print(_table(comparison))
        console.print()
    for line in _legend(comparisons):
        console.print(line, markup=False)


def _heading(name: str, comparison: Comparison) -> str:
    from msf_faiss.evaluate.comparison import describe_data, describe_exceptions

    step = "" if comparison.step is None else f", step {comparison.step:,} (epoch {comparison.epoch:.4g})"
    lines = [f"{name}{step}: accuracy in %", describe_data(comparison.data), *describe_exceptions(comparison.results)]
    return "\n".join([*lines, ""])


def _table(comparison: Comparison) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from msf_faiss.evaluate.comparison import TITLES

    gains = {metric: comparison.gain(metric) for metric in comparison.scores}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for encoder in comparison.encoders:
        table.add_column(TITLES[encoder], justify="right", no_wrap=True)
    if any(gain is not None for gain in gains.values()):
        table.add_column("gain", justify="right", no_wrap=True)
    for metric, scores in comparison.scores.items():
        cells = [
            Text(
                f"{100 * scores[encoder].accuracy:.1f}" if encoder in scores else "–",
                style="bold" if encoder == "online" else "",
            )
            for encoder in comparison.encoders
        ]
        gain = gains[metric]
        if gain is not None:
            cells.append(Text(f"{gain:+.1f}", style="green" if gain > 0 else "red" if gain < 0 else ""))
        table.add_row(metric, *cells)
    return table


def _legend(comparisons: Sequence[Comparison]) -> list[str]:
    """What the rows and columns of the tables mean."""
    metrics = {metric for comparison in comparisons for metric in comparison.scores}
    gains = any(comparison.gain(metric) is not None for comparison in comparisons for metric in comparison.scores)
    meanings = {
        "k-NN: majority vote of the k nearest training images": any("-NN" in metric for metric in metrics),
        "T: each vote is weighted by exp(similarity / T)": any(", T " in metric for metric in metrics),
        "mean per class: mean of the classes' accuracies; guessing one class scores chance": any(
            "mean per class" in metric for metric in metrics
        ),
        "linear: a linear layer trained on the frozen features": any("linear" in metric for metric in metrics),
        "fine-tune: the whole network, trained with a new linear layer": any(
            "fine-tune" in metric for metric in metrics
        ),
        "n % of labels: trained on that fraction of the labels, the same number per class": any(
            "labels" in metric for metric in metrics
        ),
        "logistic: logistic regression on the frozen features": any("logistic" in metric for metric in metrics),
        "gain: trained minus untrained, in percentage points": gains,
    }
    return [meaning for meaning, applies in meanings.items() if applies]
