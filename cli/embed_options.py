"""What `embed` and `index` share: options, and a progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import click

from .options import batch_size_option, device_option

if TYPE_CHECKING:
    from msf_faiss.checkpoint.load import EncoderName
    from msf_faiss.embeddings.embedder import Embedder

Command = TypeVar("Command", bound=Callable[..., object])


def options(command: Command) -> Command:
    """Add the arguments and options of both commands."""
    shared = [
        click.argument("run", type=click.Path(path_type=Path)),
        click.option(
            "--data",
            type=click.Path(path_type=Path),
            help="The images: a folder of image files; a .parquet or .tar file, or a folder of them; or a glob pattern "
            "of .tar files.  [default: the images of RUN]",
        ),
        click.option(
            "--split",
            type=click.Choice(["train", "test"]),
            help="Without --data: RUN's training or held-out images.  [default: train]",
        ),
        click.option(
            "--encoder",
            type=click.Choice(["online", "target"]),
            default="online",
            show_default=True,
            help="online: the trained encoder; target: its moving average.",
        ),
        click.option(
            "--features",
            "layer",
            type=click.Choice(["backbone", "projector"]),
            default="backbone",
            show_default=True,
            help="Output of the backbone, or of the projector, as in the bank.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a setting of data or views, e.g. --set data.unreadable=skip. Repeatable.",
        ),
        device_option,
        batch_size_option,
        click.option("--force", is_flag=True, help="Replace existing files."),
    ]
    for option in reversed(shared):
        command = option(command)
    return command


def check_images(data: Path | None, split: str | None) -> None:
    """Raise a usage error if both --data and --split are given."""
    if data is not None and split is not None:
        raise click.UsageError("--split chooses among the images of RUN, --data names others; give one of them")


def open_images(
    run: Path,
    data: Path | None,
    split: Literal["train", "test"] | None,
    encoder: EncoderName,
    layer: str,
    overrides: tuple[str, ...],
    device: str,
) -> Embedder:
    """Load the encoder, open the images and print how many they are."""
    from msf_faiss.embeddings.embedder import open_embedder
    from msf_faiss.embeddings.encoder import load_encoder

    loaded = load_encoder(run, encoder, projector=layer == "projector", device=device)
    embedder = open_embedder(loaded, data, overrides=overrides, split=split or "train")
    say(f"embedding {len(embedder.source):,} images ({embedder.config.data.kind})")
    return embedder


def say(line: str) -> None:
    """Print a line on stderr."""
    from .console import stderr

    stderr().print(line, markup=False)


@contextlib.contextmanager
def progress(images: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if that is a terminal; yields a function to call with the number of images done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .console import stderr

    console = stderr()
    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=images)
        yield lambda done: bar.update(task, completed=done)
