"""What the `eval-…` commands share: options, ranks, saving results, the table."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import batch_size_option, device_option

if TYPE_CHECKING:
    from rich.status import Status
    from rich.table import Table

    from msf_faiss.evaluate.linear import EpochProgress
    from msf_faiss.evaluate.logistic import PenaltyFit
    from msf_faiss.evaluate.results import EvalEncoder, Result
    from msf_faiss.evaluate.setup import EvalSetup

Score = Callable[["EvalSetup", "EvalEncoder"], Iterable["Result"]]
"""Evaluates one encoder; yields each result as soon as it is ready."""

_ENCODERS = {
    "online": "backbone of the trained encoder",
    "target": "backbone of its moving average",
    "weights": "backbone in a state dict",
    "untrained": "the network before training",
    "pixels": "the pixels of the centre crop",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The arguments and options that all evaluations share."""

    run: Path
    encoders: tuple[EvalEncoder, ...]
    overrides: tuple[str, ...]
    base: str | None
    arch: str | None
    device: str
    batch_size: int
    out: Path | None
    cache: Path | None
    keep: bool
    as_json: bool
    every: bool  # without --encoder, evaluate all encoders instead of the first

    def evaluate(self, score: Score, *, finish: Callable[[Path], Path] | None = None) -> int:
        """Evaluate each encoder, save each result at once, and print all of them; returns the exit code.

        `finish` is called with the results folder, if there is one, even after an error, and returns a file it wrote.
        """
        from msf_faiss.device import select_device
        from msf_faiss.distributed.ranks import join_ranks
        from msf_faiss.evaluate.feature_cache import FOLDER as FEATURES
        from msf_faiss.evaluate.feature_cache import FeatureCache
        from msf_faiss.evaluate.results import FOLDER, prepare_folder, save_result
        from msf_faiss.evaluate.setup import open_setup
        from msf_faiss.evaluate.weights import run_of

        from .console import stderr

        with join_ranks(self.device) as ranks, stderr().status("") as status:

            def notify(line: str) -> None:
                if ranks.is_main:
                    status.console.print(line, markup=False)

            run_dir = run_of(self.run)
            cache = self.cache or (run_dir / FEATURES if run_dir else None)
            setup = open_setup(
                self.run,
                self.overrides,
                select_device(self.device),
                base=self.base,
                arch=self.arch,
                cache=FeatureCache(cache) if self.keep and cache else None,
                ranks=ranks,
                batch_size=self.batch_size,
                notify=notify,
                on_progress=functools.partial(_show_progress, status) if ranks.is_main else lambda progress: None,
            )
            folder = self.out or (run_dir / FOLDER if run_dir else None)
            if folder is None:
                notify("results will not be saved: the weights belong to no run; name a folder with --out")
            else:
                ranks.on_main(functools.partial(prepare_folder, folder))
            results = []
            default = (*setup.weights.trained, "untrained", "pixels") if self.every else setup.weights.trained[:1]
            try:
                for encoder in dict.fromkeys(self.encoders or default):
                    for result in score(setup, encoder):
                        results.append(result)
                        if folder and ranks.is_main:
                            notify(f"saved {save_result(result, folder)}")
            finally:  # results before an error or Ctrl-C count too
                if finish and folder and results and ranks.is_main:
                    notify(f"saved {finish(folder)}")
        if ranks.is_main:
            show(results, as_json=self.as_json, name=str(self.run))
        if ranks.size > 1:  # as in `pretrain`
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        return 0


def options(*encoders: EvalEncoder, every: bool = False) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Add the arguments and options of all evaluations, which the command gets as a `Session`.

    `encoders` are the choices of --encoder; the default is the first, or with `every` all of those in the weights.
    """
    meanings = "; ".join(f"{name}: {_ENCODERS[name]}" for name in encoders)
    shared = [
        click.argument("run", type=click.Path(path_type=Path)),
        click.option(
            "--encoder",
            "encoders",
            type=click.Choice(encoders),
            multiple=True,
            help=f"Features to score. {meanings}. Repeatable.  "
            f"[default: {'all that RUN has' if every else 'online, or weights'}]",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Use other data or views, e.g. --set data.kind=parquet --set data.path=FILE. Repeatable.",
        ),
        click.option(
            "--config",
            "base",
            metavar="CONFIG",
            help="For a file of weights: config with data, views and network, as for `pretrain`.",
        ),
        click.option(
            "--arch",
            metavar="NAME",
            help="For a file of weights: its network, from torchvision, or timm:NAME.  [default: the config's]",
        ),
        device_option,
        batch_size_option,
        click.option(
            "--out",
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder for the results.  [default: RUN/results; none for weights outside a run]",
        ),
        click.option(
            "--cache",
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder that caches features for further evaluations of the same weights.  [default: RUN/features; "
            "none for weights outside a run]",
        ),
        click.option("--keep/--no-keep", default=True, help="Cache features.  [default: keep]"),
        click.option("--json", "as_json", is_flag=True, help="Print the results with their protocols as JSON."),
    ]
    names = set(Session.__slots__) - {"every"}

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def with_session(**given: Any) -> int:
            session = Session(every=every, **{name: given.pop(name) for name in names})
            return command(session, **given)

        for option in reversed(shared):
            with_session = option(with_session)
        return with_session

    return decorate


def _show_progress(status: Status, progress: EpochProgress | PenaltyFit) -> None:
    """Update a line on a terminal; elsewhere print a line per epoch."""
    from msf_faiss.evaluate.linear import EpochProgress

    if isinstance(progress, EpochProgress):
        last = progress.epoch == progress.epochs
        line = (
            f"epoch {progress.epoch}/{progress.epochs} · loss {progress.loss:.4f} · "
            f"{progress.images} accuracy {progress.accuracy:.1%}"
        )
        if last or not status.console.is_terminal:
            status.console.print(line, markup=False)
    else:
        last = progress.number == progress.fits
        line = (
            f"penalty {progress.number}/{progress.fits} · lambda {progress.penalty:.2g} · "
            f"validation {progress.metric} {progress.score:.1%}"
        )
    status.update("" if last else line)


def show(results: Sequence[Result], *, as_json: bool, name: str) -> None:
    """Print all results: one row per encoder, or with several evaluations one row per metric."""
    from msf_faiss.evaluate.comparison import compare

    from .console import stdout
    from .results import print_comparisons

    if as_json:
        click.echo(json.dumps({"results": [result.to_json() for result in results]}, indent=2))
        return
    if len({result.file_name for result in results}) > len({result.encoder for result in results}):
        print_comparisons(name, compare(results))
        return
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(_heading(result), []).append(result)
    for heading, group in groups.items():
        stdout().print(heading, markup=False)
        stdout().print(_table(group))


def _heading(result: Result) -> str:
    from msf_faiss.evaluate.comparison import describe_data, describe_exceptions

    title = f"accuracy in %, {describe_data(result.protocol['data'])}"
    return "\n".join([title, *describe_exceptions([result]), ""])


def _table(results: Sequence[Result]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for result in results:
        step = f" (step {result.step:,})" if result.checkpoint and result.step is not None else ""
        table.add_column(f"{result.encoder}{step}", justify="right", no_wrap=True)
    accuracies = [{score.metric: f"{100 * score.accuracy:.1f}" for score in result.scores} for result in results]
    for metric in dict.fromkeys(metric for each in accuracies for metric in each):
        table.add_row(metric, *(each.get(metric, "–") for each in accuracies))
    return table
