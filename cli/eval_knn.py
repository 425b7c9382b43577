"""`msf-faiss eval-knn`."""

from __future__ import annotations

import click

from .eval_session import Session, options


@click.command(short_help="Score frozen features by their nearest neighbours.")
@options("online", "target", "weights", "untrained", "pixels")
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
def command(session: Session, ks: tuple[int, ...], temperatures: tuple[float, ...], limit: int | None) -> int:
    """Score frozen features by their nearest neighbours.

    RUN is a run directory (its newest checkpoint), a checkpoint directory, or a file of weights with --config. Each
    held-out image gets the class that most of its k most similar training images have; without held-out images each
    training image is judged by the others. Search is exact, on L2-normalised features of centre crops.
    """
    from msf_faiss.evaluate.scoring import score_knn

    return session.evaluate(
        lambda setup, encoder: [
            score_knn(
                setup,
                encoder,
                ks=ks,
                temperatures=temperatures,
                limit=limit,
                batch_size=session.batch_size,
                notify=session.say,
            )
        ]
    )
