"""What the `eval-…` commands share: options, ranks, saving, the table."""

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

if TYPE_CHECKING:
    from rich.status import Status
    from rich.table import Table

    from msf_faiss.evaluate.finetune import FinetuneEpoch
    from msf_faiss.evaluate.linear import ProbeEpoch
    from msf_faiss.evaluate.results import EncoderName, Result
    from msf_faiss.evaluate.setup import EvalSetup

Score = Callable[["EvalSetup", "EncoderName"], Iterable["Result"]]
"""From one encoder of the setup to its results, one after the other."""

_EXPLAINED = {
    "online": "the online encoder's backbone, the one that is trained",
    "target": "the target encoder's, its moving average",
    "weights": "the only one of a state dict",
    "untrained": "the same network as it was before the first step",
    "pixels": "no network, only the pixels",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What was asked for, but for what is an evaluation's own."""

    run: Path
    encoders: tuple[EncoderName, ...]
    overrides: tuple[str, ...]
    base: str | None
    arch: str | None
    device: str
    batch_size: int
    out: Path | None
    cache: Path | None
    keep: bool
    as_json: bool
    every: bool  # without --encoder: all that there are, not only the first

    def say(self, line: str) -> None:
        """Tell in a line what happens; rank 0 alone does."""
        from .console import stderr

        if _is_main():
            stderr().print(line, markup=False)

    def evaluate(self, score: Score, *, finish: Callable[[Path], object] | None = None) -> int:
        """Score each encoder, save each result as soon as it is there, and print them all; the exit code.

        `finish` is called at the end, however that comes, with the folder of the results if they have one.
        """
        from msf_faiss.device import select_device
        from msf_faiss.distributed.ranks import join_ranks
        from msf_faiss.evaluate.feature_cache import FOLDER as FEATURES
        from msf_faiss.evaluate.feature_cache import FeatureCache
        from msf_faiss.evaluate.results import FOLDER, prepare_folder, save_result
        from msf_faiss.evaluate.setup import open_setup
        from msf_faiss.evaluate.weights import run_of

        with join_ranks(self.device) as ranks:
            run_dir = run_of(self.run)
            cached = self.cache or (run_dir / FEATURES if run_dir else None)
            setup = open_setup(
                self.run,
                self.overrides,
                select_device(self.device),
                base=self.base,
                arch=self.arch,
                cache=FeatureCache(cached) if self.keep and cached else None,
                ranks=ranks,
            )
            folder = self.out or (run_dir / FOLDER if run_dir else None)
            if folder is None:
                self.say("nothing will be saved: the weights belong to no run; --out names a folder for results")
            else:
                ranks.on_main(functools.partial(prepare_folder, folder))
            results = []
            default = (*setup.weights.trained, "untrained", "pixels") if self.every else setup.weights.trained[:1]
            try:
                for encoder in dict.fromkeys(self.encoders or default):
                    for result in score(setup, encoder):
                        results.append(result)
                        if folder and ranks.is_main:
                            self.say(f"saved {save_result(result, folder)}")
            finally:  # what was found before a mistake or Ctrl-C counts
                if finish and folder and results and ranks.is_main:
                    finish(folder)
            if ranks.is_main:
                show(results, as_json=self.as_json, name=str(self.run))
        if ranks.size > 1:  # as in `pretrain`
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        return 0


def options(*encoders: EncoderName, every: bool = False) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """The arguments and options of all evaluations, given to the command as a `Session`.

    `encoders` are the choices of --encoder, and without it the first, or with `every` all that there are, are scored.
    """
    explained = "; ".join(f"{name}: {_EXPLAINED[name]}" for name in encoders)
    default = "all that there are" if every else "online, or weights"
    shared = [
        click.argument("run", type=click.Path(path_type=Path)),
        click.option(
            "--encoder",
            "encoders",
            type=click.Choice(encoders),
            multiple=True,
            help=f"Whose features ({explained}). Repeatable: one row each.  [default: {default}]",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Evaluate on other data or views, e.g. --set data.kind=parquet --set data.path=FILE. Repeatable.",
        ),
        click.option(
            "--config",
            "base",
            metavar="CONFIG",
            help="For a file of weights: the config with data, views and network, as `pretrain` takes it.",
        ),
        click.option(
            "--arch",
            metavar="NAME",
            help="For a file of weights: its network, one of torchvision's or timm:NAME.  [default: the config's]",
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
            help="Folder for the results.  [default: RUN/results; none for weights outside a run]",
        ),
        click.option(
            "--cache",
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder where features are kept for the next evaluation of the same weights.  [default: RUN/features;"
            " none for weights outside a run]",
        ),
        click.option("--keep/--no-keep", default=True, help="Keep features.  [default: keep]"),
        click.option("--json", "as_json", is_flag=True, help="Print the results and their protocol as JSON."),
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


class EpochLines:
    """What each epoch of a probe came to: a line that changes on a terminal, else a line each."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def __call__(self, done: ProbeEpoch | FinetuneEpoch) -> None:
        from msf_faiss.evaluate.linear import ProbeEpoch

        from .console import stderr

        if not _is_main():
            return
        judged = "held-out" if isinstance(done, ProbeEpoch) else "training"
        line = f"epoch {done.epoch}/{done.epochs}  loss {done.loss:.4f}  {judged} accuracy {done.accuracy:.1%}"
        last, console = done.epoch == done.epochs, stderr()
        if console.is_terminal:
            self._status.update("" if last else line)
        if last or not console.is_terminal:
            console.print(line, markup=False)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def show(results: Sequence[Result], *, as_json: bool, name: str) -> None:
    """Print what was found, all of it: a row an encoder; of several evaluations a row a metric."""
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
