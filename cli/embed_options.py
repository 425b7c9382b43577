"""What `embed` and `index` share: options, and how far the work has come."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., object])


def options(command: Command) -> Command:
    """The arguments and options of both commands."""
    shared = [
        click.argument("run", type=click.Path(path_type=Path)),
        click.option(
            "--data",
            type=click.Path(path_type=Path),
            help="The images: a folder of them, or a .parquet or .tar file, a folder or a pattern of such.  "
            "[default: those that RUN was trained on]",
        ),
        click.option(
            "--split",
            type=click.Choice(["train", "test"]),
            help="Without --data: RUN's training images, or its held-out ones.  [default: train]",
        ),
        click.option(
            "--encoder",
            type=click.Choice(["online", "target"]),
            default="online",
            show_default=True,
            help="online: the one that is trained; target: its moving average.",
        ),
        click.option(
            "--features",
            "part",
            type=click.Choice(["backbone", "projector"]),
            default="backbone",
            show_default=True,
            help="Before the projector, or behind it as in the bank.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Settings of data and views, e.g. --set data.unreadable=skip. Repeatable.",
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
        click.option("--force", is_flag=True, help="Replace files that are there already."),
    ]
    for option in reversed(shared):
        command = option(command)
    return command


def say(line: str) -> None:
    """Print a line on stderr."""
    from .console import stderr

    stderr().print(line, markup=False)


@contextlib.contextmanager
def progress(images: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr if it is a terminal, to be told how many of the images are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .console import stderr

    console = stderr()
    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=images)
        yield lambda done: bar.update(task, completed=done)
