"""`msf-faiss eval-linear`."""

from __future__ import annotations

import click

from .eval_session import EpochLines, Session, options


@click.command(short_help="Score frozen features by a linear probe, the paper's protocol.")
@options("online", "target", "weights", "untrained")
@click.option("--fast", is_flag=True, help="Train on the features of centre crops, computed once: no augmentation.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=40,
    show_default=True,
    help="Epochs; the learning rate falls after 3/8 and 6/8 of them. The paper's figures are for 40.",
)
def command(session: Session, fast: bool, epochs: int) -> int:
    """Score frozen features by a linear probe, the paper's protocol.

    RUN is a run directory (its newest checkpoint), a checkpoint directory, or a file of weights with --config. One
    linear layer is trained on the frozen, normalised features of random crops of the training images, and judged by
    the held-out images.
    """
    from msf_faiss.evaluate.scoring import score_linear

    from .console import stderr

    with stderr().status("") as status:
        lines = EpochLines(status)
        return session.evaluate(
            lambda setup, encoder: [
                score_linear(
                    setup,
                    encoder,
                    fast=fast,
                    epochs=epochs,
                    batch_size=session.batch_size,
                    on_epoch=lines,
                    notify=session.say,
                )
            ]
        )
