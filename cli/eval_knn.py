"""`msf-faiss eval-knn`."""

import click

from .eval_session import Session, options


@click.command
@options("online", "target", "weights", "untrained", "pixels")
@click.option(
    "--k",
    "ks",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 20, 200),
    show_default=True,
    help="Number of neighbours that vote. Repeatable.",
)
@click.option(
    "--temperature",
    "temperatures",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    default=(0.07, 0.1),
    show_default=True,
    help="T of an additional vote weighted by exp(similarity / T). Repeatable.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=2),
    help="Use at most this many training and held-out images, a fixed sample.  [default: all]",
)
def command(session: Session, ks: tuple[int, ...], temperatures: tuple[float, ...], limit: int | None) -> int:
    """Score frozen features by their nearest neighbours.

    RUN is a run directory (its newest checkpoint), a checkpoint directory, or a file of weights with --config. Each
    held-out image is classified by a vote of its k nearest training images; without held-out images, training images
    classify each other (leave-one-out). Search is exact, on L2-normalised features of centre crops.
    """
    from msf_faiss.evaluate.scoring import score_knn

    return session.evaluate(
        lambda setup, encoder: [score_knn(setup, encoder, ks=ks, temperatures=temperatures, limit=limit)]
    )
