"""What `eval-knn` and `eval-linear` share: options, saving, the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from rich.table import Table

    from msf_faiss.evaluate.results import EncoderName, Result
    from msf_faiss.evaluate.subject import Subject

Command = TypeVar("Command", bound=Callable[..., object])

_EXPLAINED = {
    "online": "the online encoder's backbone, the one that is trained",
    "target": "the target encoder's, its moving average",
    "untrained": "the same network as it was before the first step",
    "pixels": "no network, only the pixels",
}


def options(*encoders: EncoderName) -> Callable[[Command], Command]:
    """The arguments and options of both commands; `encoders` are the choices of --encoder."""
    explained = "; ".join(f"{name}: {_EXPLAINED[name]}" for name in encoders)
    shared = [
        click.argument("run", type=click.Path(path_type=Path)),
        click.option(
            "--encoder",
            "encoders",
            type=click.Choice(encoders),
            multiple=True,
            default=("online",),
            show_default=True,
            help=f"Whose features ({explained}). Repeatable: one row each.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Evaluate on other data or views, e.g. --set data.kind=parquet --set data.path=FILE. Repeatable.",
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="auto: CUDA where there is a GPU.",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=256,
            show_default=True,
            help="Images embedded at a time.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder for the results.  [default: RUN/results; none for a checkpoint outside a run]",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the results and their protocol as JSON."),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(shared):
            command = option(command)
        return command

    return decorate


def score_all(
    subject: Subject,
    encoders: Sequence[EncoderName],
    score: Callable[[EncoderName], Result],
    *,
    out: Path | None,
    say: Callable[[str], None],
) -> list[Result]:
    """Score each encoder, and save each result as soon as it is there."""
    from msf_faiss.evaluate.results import FOLDER, prepare_folder, save_result

    run_dir = subject.checkpoint.run_dir
    folder = out or (run_dir / FOLDER if run_dir else None)
    if folder:
        prepare_folder(folder)
    else:
        say("nothing will be saved: the checkpoint lies outside a run; --out names a folder for results")
    results = []
    for encoder in dict.fromkeys(encoders):
        results.append(score(encoder))
        if folder:
            say(f"saved {save_result(results[-1], folder)}")
    return results


def show(results: Sequence[Result], *, as_json: bool) -> None:
    """Print what was found, all of it."""
    from .console import stdout

    if as_json:
        click.echo(json.dumps({"results": [result.to_json() for result in results]}, indent=2))
        return
    stdout().print(_heading(results[0]), markup=False)
    stdout().print(_table(results))


def _heading(result: Result) -> str:
    from msf_faiss.evaluate.comparison import describe_data

    data = result.protocol["data"]
    lines = [f"accuracy in %, {describe_data(data)}"]
    lines += [
        f"k = {k} is more than the voters there are: {count:,} vote"
        for k, count in result.protocol.get("clamped_k", {}).items()
    ]
    lines += [
        f"left out: {count:,} {why} {'training' if split == 'train' else 'held-out'} images"
        for split, reasons in data["left_out"].items()
        for why, count in reasons.items()
        if count
    ]
    return "\n".join([*lines, ""])


def _table(results: Sequence[Result]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1))
    table.add_column("encoder")
    metrics = dict.fromkeys(score.metric for result in results for score in result.scores)
    for metric in metrics:
        table.add_column(metric.replace(", ", "\n"), justify="right", no_wrap=True)
    for result in results:
        accuracies = {score.metric: f"{100 * score.accuracy:.1f}" for score in result.scores}
        step = f" (step {result.step:,})" if result.checkpoint and result.step is not None else ""
        table.add_row(f"{result.encoder}{step}", *(accuracies.get(metric, "–") for metric in metrics))
    return table
