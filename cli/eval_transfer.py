"""`msf-faiss eval-transfer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .eval_session import Session, options

if TYPE_CHECKING:
    from msf_faiss.evaluate.logistic import Metric


@click.command
@options("online", "target", "weights", "untrained")
@click.option(
    "--metric",
    type=click.Choice(["accuracy", "mean-per-class"]),
    default="accuracy",
    show_default=True,
    help="Metric that chooses the penalty and is listed first; both are reported. mean-per-class is usual for "
    "Caltech-101, Pets, Flowers and Aircraft.",
)
@click.option("--fast", is_flag=True, help="Try only every fourth of the 45 penalties.")
def command(session: Session, metric: Metric, fast: bool) -> int:
    """Score frozen features by logistic regression, on any labelled data.

    RUN is a run directory (its newest checkpoint), a checkpoint directory, or a file of weights with --config; name the
    target data with --set. The l2 penalty is chosen from 45 values between 1e-6 and 1e5 on a fifth of the training
    images; then the classifier is refitted on all training images and scored on the held-out images.
    """
    from msf_faiss.evaluate.logistic import FAST_GRID, GRID
    from msf_faiss.evaluate.transfer import score_transfer

    penalties = FAST_GRID if fast else GRID
    return session.evaluate(lambda setup, encoder: [score_transfer(setup, encoder, metric=metric, penalties=penalties)])
