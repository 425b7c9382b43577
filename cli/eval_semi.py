"""`msf-faiss eval-semi`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .eval_session import EpochLines, Session, options

if TYPE_CHECKING:
    from msf_faiss.evaluate.semi import Mode


def _share(text: str) -> float:
    """A share of the labels, written as 1% or 0.01."""
    try:
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no share of the labels; give it as 1% or 0.01") from error
    if not 0 < share <= 1:
        raise click.BadParameter(f"{text!r} is not above 0 and at most 100%")
    return share


@click.command(short_help="Score an encoder with 1 % and 10 % of the labels, frozen and fine-tuned.")
@options("online", "target", "weights", "untrained")
@click.option(
    "--labels",
    "fractions",
    type=_share,
    multiple=True,
    metavar="SHARE",
    help="Share of the training images that keep their labels, as many of each class. Repeatable.  [default: 1%, 10%]",
)
@click.option(
    "--subset",
    "files",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="A list of the images that keep their labels: a file name (or an id) a line. Repeatable.",
)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(["linear", "fine-tune"]),
    multiple=True,
    default=("linear", "fine-tune"),
    show_default=True,
    help="linear: one layer on the frozen features; fine-tune: the whole network. Repeatable.",
)
@click.option("--fast", is_flag=True, help="Train the linear layer on the features of centre crops: no augmentation.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Epochs; the learning rate falls at the same shares of them.  [default: linear 40, fine-tune 20]",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Of the network in a fine-tune.  [default: 0.01; 0.02 for 1 % of the labels if these are 5,000 or more]",
)
@click.option(
    "--head-learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Of the new layer in a fine-tune.  [default: 0.2; 5 for 1 % of the labels if these are 5,000 or more]",
)
@click.option(
    "--subset-seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Which images keep their labels.",
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

    RUN is a run directory (its newest checkpoint), a checkpoint directory, or a file of weights with --config. The
    labelled images are the same number of each class, chosen by --subset-seed alone; the held-out images judge.
    """
    from msf_faiss.evaluate import linear
    from msf_faiss.evaluate.semi import FRACTIONS, score_semi

    from .console import stderr

    kept: tuple[float | Path, ...] = (*(fractions or (() if files else FRACTIONS)), *files)
    asked = {"epochs": epochs, "backbone_learning_rate": learning_rate, "head_learning_rate": head_learning_rate}
    changes = {name: value for name, value in asked.items() if value is not None}
    with stderr().status("") as status:
        lines = EpochLines(status)
        return session.evaluate(
            lambda setup, encoder: (
                score_semi(
                    setup,
                    encoder,
                    labels=labels,
                    mode=mode,
                    fast=fast,
                    epochs=epochs or linear.EPOCHS,
                    changes=changes,
                    subset_seed=subset_seed,
                    batch_size=session.batch_size,
                    on_epoch=lines,
                    notify=session.say,
                )
                for labels in kept
                for mode in dict.fromkeys(modes)
            )
        )
