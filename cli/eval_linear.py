"""`msf-faiss eval-linear`."""

import click

from .eval_session import Session, options


@click.command
@options("online", "target", "weights", "untrained")
@click.option("--fast", is_flag=True, help="Train on features of centre crops, computed once: no augmentation.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Epochs; the learning rate falls after 3/8 and 6/8 of them.  [default: 40, as in the paper; more on few "
    "images, until 4,000 steps]",
)
def command(session: Session, fast: bool, epochs: int | None) -> int:
    """Score frozen features by a linear probe, the paper's protocol.

    RUN is a run directory (its newest checkpoint), a checkpoint directory, or a file of weights with --config. A linear
    layer is trained on the frozen, normalised features of random crops of the training images, and scored on the
    held-out images.
    """
    from msf_faiss.evaluate.scoring import score_linear

    return session.evaluate(lambda setup, encoder: [score_linear(setup, encoder, fast=fast, epochs=epochs)])
