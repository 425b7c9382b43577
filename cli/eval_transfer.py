"""`msf-faiss eval-transfer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .eval_session import Session, options

if TYPE_CHECKING:
    from msf_faiss.evaluate.logistic import Fit, Metric

_FEW = 4  # one penalty of so many with --fast


@click.command(short_help="Score frozen features by logistic regression, on any labelled data.")
@options("online", "target", "weights", "untrained")
@click.option(
    "--metric",
    type=click.Choice(["accuracy", "mean-per-class"]),
    default="accuracy",
    show_default=True,
    help="What chooses the regularisation and comes first: share of the images, or its mean over the classes, the"
    " custom for Caltech-101, Pets, Flowers and Aircraft. Both are told.",
)
@click.option("--fast", is_flag=True, help="Try every fourth penalty of the 45 alone.")
def command(session: Session, metric: Metric, fast: bool) -> int:
    """Score frozen features by logistic regression, on any labelled data.

    RUN is a run directory (its newest checkpoint), a checkpoint directory, or a file of weights with --config; --set
    names the data to transfer to. The l2 penalty is chosen on a fifth of the training images from 45 values between
    1e-6 and 1e5; then all training images are fitted and the held-out images judged (scikit-learn, L-BFGS).
    """
    from msf_faiss.evaluate.logistic import GRID
    from msf_faiss.evaluate.transfer import score_transfer

    from .console import stderr

    with stderr().status("") as status:

        def on_fit(done: Fit) -> None:
            last = done.number == done.fits
            line = f"penalty {done.number}/{done.fits}  {done.strength:.2g}  validation {metric} {done.score:.1%}"
            status.update("" if last else line)

        return session.evaluate(
            lambda setup, encoder: [
                score_transfer(
                    setup,
                    encoder,
                    metric=metric,
                    strengths=GRID[::_FEW] if fast else GRID,
                    batch_size=session.batch_size,
                    on_fit=on_fit,
                    notify=session.say,
                )
            ]
        )
