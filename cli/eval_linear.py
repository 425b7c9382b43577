"""`msf-faiss eval-linear`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .evaluation import options, score_all, show

if TYPE_CHECKING:
    from msf_faiss.evaluate.linear import ProbeEpoch
    from msf_faiss.evaluate.results import EncoderName


@click.command(short_help="Score a checkpoint's frozen features by a linear probe, the paper's protocol.")
@options("online", "target", "untrained")
@click.option("--fast", is_flag=True, help="Train on the features of centre crops, computed once: no augmentation.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=40,
    show_default=True,
    help="Epochs; the learning rate falls after 3/8 and 6/8 of them. The paper's figures are for 40.",
)
def command(
    run: Path,
    encoders: tuple[EncoderName, ...],
    overrides: tuple[str, ...],
    device: str,
    batch_size: int,
    out: Path | None,
    as_json: bool,
    fast: bool,
    epochs: int,
) -> None:
    """Score a checkpoint's frozen features by a linear probe, the paper's protocol.

    RUN is a run directory (its newest checkpoint) or a checkpoint directory. One linear layer is trained on the frozen,
    normalised features of random crops of the training images, and judged by the held-out images.
    """
    from msf_faiss.evaluate.scoring import score_linear
    from msf_faiss.evaluate.subject import open_subject
    from msf_faiss.train import select_device

    from .console import stderr

    console = stderr()

    def say(line: str) -> None:
        console.print(line, markup=False)

    def on_epoch(done: ProbeEpoch) -> None:
        line = f"epoch {done.epoch}/{done.epochs}  loss {done.loss:.4f}  held-out accuracy {done.accuracy:.1%}"
        last = done.epoch == done.epochs
        if console.is_terminal:
            status.update("" if last else line)
        if last or not console.is_terminal:
            say(line)

    subject = open_subject(run, overrides, select_device(device))
    with console.status("") as status:
        results = score_all(
            subject,
            encoders,
            lambda encoder: score_linear(
                subject, encoder, fast=fast, epochs=epochs, batch_size=batch_size, on_epoch=on_epoch, notify=say
            ),
            out=out,
            say=say,
        )
    show(results, as_json=as_json)
