"""`msf-faiss eval-semi`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .eval_session import Session, options

if TYPE_CHECKING:
    from msf_faiss.evaluate.semi import Mode


def _fraction(text: str) -> float:
    """A fraction of the labels, written as 1% or 0.01."""
    try:
        fraction = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a fraction of the labels; write 1% or 0.01") from error
    if not 0 < fraction <= 1:
        raise click.BadParameter(f"{text!r} is not above 0 and at most 100%")
    return fraction


@click.command
@options("online", "target", "weights", "untrained")
@click.option(
    "--labels",
    "fractions",
    type=_fraction,
    multiple=True,
    metavar="FRACTION",
    help="Fraction of the labels to keep, the same number per class. Repeatable.  [default: 1%, 10%]",
)
@click.option(
    "--subset",
    "files",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="List of the images that keep their labels, one file name or id per line. Repeatable.",
)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(["linear", "fine-tune"]),
    multiple=True,
    default=("linear", "fine-tune"),
    show_default=True,
    help="linear: train a linear layer on frozen features; fine-tune: train the whole network. Repeatable.",
)
@click.option("--fast", is_flag=True, help="Train the linear layer on features of centre crops: no augmentation.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Epochs; the learning rate falls at the same fractions of them.  [default: linear 40, or more "
    "on few images, until 4,000 steps; fine-tune 20]",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Learning rate of the backbone when fine-tuning.  [default: 0.01; 0.02 with 1 % of the labels if these are "
    "5,000 or more]",
)
@click.option(
    "--head-learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Learning rate of the new layer when fine-tuning.  [default: 0.2; 5 with 1 % of the labels if these are 5,000 "
    "or more]",
)
@click.option(
    "--subset-seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed for the choice of images that keep their labels.",
)
def command(
    session: Session,
    fractions: tuple[float, ...],
    files: tuple[Path, ...],
    modes: tuple[Mode, ...],
    fast: bool,
    epochs: int | None,
    learning_rate: float | None,
    head_learning_rate: float | None,
    subset_seed: int,
) -> int:
    """Score an encoder with 1 % and 10 % of the labels, frozen and fine-tuned.

    RUN is a run directory (its newest checkpoint), a checkpoint directory, or a file of weights with --config. Training
    uses the same number of labelled images per class, chosen by --subset-seed; scores are of the held-out images.
    """
    from msf_faiss.evaluate.semi import FRACTIONS, score_semi

    subsets: tuple[float | Path, ...] = (*(fractions or (() if files else FRACTIONS)), *files)
    given = {"epochs": epochs, "backbone_learning_rate": learning_rate, "head_learning_rate": head_learning_rate}
    changes = {name: value for name, value in given.items() if value is not None}
    return session.evaluate(
        lambda setup, encoder: (
            score_semi(
                setup,
                encoder,
                labels=labels,
                mode=mode,
                fast=fast,
                epochs=epochs,
                changes=changes,
                subset_seed=subset_seed,
            )
            for labels in subsets
            for mode in dict.fromkeys(modes)
        )
    )
