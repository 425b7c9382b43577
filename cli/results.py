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

_PICTURES = {".html", ".png"}


@click.command(short_help="Show all that the evaluations found for a run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the results with their protocols as JSON.")
def command(run: Path, as_json: bool) -> None:
    """Show all that the evaluations found for a run: trained beside untrained, and the galleries.

    RUN is a run directory. Evaluations put their results there: eval-knn and eval-linear with --encoder online
    --encoder untrained.
    """
    from msf_faiss.errors import UserError
    from msf_faiss.evaluate.comparison import compare
    from msf_faiss.evaluate.results import FOLDER, load_results

    from .console import stdout

    if not run.is_dir():
        raise UserError(f"{run}: no such run directory")
    results = load_results(run / FOLDER)
    galleries = sorted(path for path in (run / "neighbors").glob("*") if path.suffix in _PICTURES)
    if as_json:
        found = {
            "run": str(run),
            "results": [result.to_json() for result in results],
            "galleries": [str(path) for path in galleries],
        }
        click.echo(json.dumps(found, indent=2))
        return
    if not results and not galleries:
        raise UserError(
            f"{run}: holds no results yet; run `msf-faiss eval-knn {run} --encoder online --encoder untrained` first"
        )
    print_comparisons(str(run), compare(results))
    for path in galleries:
        stdout().print(f"gallery: {path}", markup=False)


def print_comparisons(name: str, comparisons: Sequence[Comparison]) -> None:
    """A table each, a row a metric and a column an encoder, and what these mean."""
    from .console import stdout

    console = stdout()
    for comparison in comparisons:
        console.print(_heading(name, comparison), markup=False)
        console.print(_table(comparison))
        console.print()
    for line in _explanations(comparisons):
        console.print(line, markup=False)


def _heading(name: str, comparison: Comparison) -> str:
    from msf_faiss.evaluate.comparison import describe_data

    when = "" if comparison.step is None else f", after step {comparison.step:,} (epoch {comparison.epoch:.4g})"
    return f"{name}{when}: accuracy in %\n{describe_data(comparison.data)}\n"


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
        if gain is None:
            table.add_row(metric, *cells)
        else:
            table.add_row(
                metric, *cells, Text(f"{gain:+.1f}", style="green" if gain > 0 else "red" if gain < 0 else "")
            )
    return table


def _explanations(comparisons: Sequence[Comparison]) -> list[str]:
    """What the rows and columns mean, for those that are there."""
    metrics = {metric for comparison in comparisons for metric in comparison.scores}
    gains = any(comparison.gain(metric) is not None for comparison in comparisons for metric in comparison.scores)
    meanings = {
        "k-NN: the k most similar training images vote for the class": any("-NN" in metric for metric in metrics),
        "T: their votes count exp(similarity / T) instead of one": any(", T " in metric for metric in metrics),
        "linear: one linear layer, trained on the frozen features": any("linear" in metric for metric in metrics),
        "fine-tune: the whole network, trained with such a layer": any("fine-tune" in metric for metric in metrics),
        "n % of labels: that share of the training images, as many of each class": any(
            "labels" in metric for metric in metrics
        ),
        "logistic: logistic regression on the frozen features": any("logistic" in metric for metric in metrics),
        "gain: trained minus untrained, in percentage points": gains,
    }
    return [meaning for meaning, applies in meanings.items() if applies]
