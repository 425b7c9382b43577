"""`msf-faiss eval-knn`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .evaluation import options, score_all, show

if TYPE_CHECKING:
    from msf_faiss.evaluate.results import EncoderName


@click.command(short_help="Score a checkpoint's frozen features by their nearest neighbours.")
@options("online", "target", "untrained", "pixels")
@click.option(
    "--k",
    "ks",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 20, 200),
    show_default=True,
    help="Neighbours that vote. Repeatable.",
)
@click.option(
    "--temperature",
    "temperatures",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    default=(0.07, 0.1),
    show_default=True,
    help="T of the weighted vote exp(similarity / T), beside the plain majority. Repeatable.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=2),
    help="Use at most so many training and so many held-out images, a fixed sample.  [default: all]",
)
def command(
    run: Path,
    encoders: tuple[EncoderName, ...],
    overrides: tuple[str, ...],
    device: str,
    batch_size: int,
    out: Path | None,
    as_json: bool,
    ks: tuple[int, ...],
    temperatures: tuple[float, ...],
    limit: int | None,
) -> None:
    """Score a checkpoint's frozen features by their nearest neighbours.

    RUN is a run directory (its newest checkpoint) or a checkpoint directory. Each held-out image gets the class that
    most of its k most similar training images have; without held-out images each training image is judged by the
    others. Search is exact, on L2-normalised features of centre crops.
    """
    from msf_faiss.evaluate.scoring import score_knn
    from msf_faiss.evaluate.subject import open_subject
    from msf_faiss.train import select_device

    from .console import stderr

    console = stderr()

    def say(line: str) -> None:
        console.print(line, markup=False)

    subject = open_subject(run, overrides, select_device(device))
    results = score_all(
        subject,
        encoders,
        lambda encoder: score_knn(
            subject, encoder, ks=ks, temperatures=temperatures, limit=limit, batch_size=batch_size, notify=say
        ),
        out=out,
        say=say,
    )
    show(results, as_json=as_json)
