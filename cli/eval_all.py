"""`msf-faiss eval-all`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .eval_session import Session, options

if TYPE_CHECKING:
    from msf_faiss.evaluate.suite import Family


@click.command
@options("online", "target", "weights", "untrained", "pixels", every=True)
@click.option(
    "--only",
    "families",
    type=click.Choice(["knn", "linear", "semi", "transfer"]),
    multiple=True,
    help="Run only these. Repeatable.  [default: all]",
)
@click.option("--fast", is_flag=True, help="Linear probes without augmentation, no fine-tuning, every fourth penalty.")
def command(session: Session, families: tuple[Family, ...], fast: bool) -> int:
    """Run every evaluation that the data allow, and summarise them on one page.

    RUN is a run directory (its newest checkpoint), a checkpoint directory, or a file of weights with --config. Runs
    kNN, a linear probe, evaluations with 1 % and 10 % of the labels, and logistic regression, also for the untrained
    network. Writes summary.md and summary.json, with all results of the folder, to the results folder.
    """
    from msf_faiss.evaluate.suite import FAMILIES, score_suite
    from msf_faiss.evaluate.summary import write_summary

    return session.evaluate(
        lambda setup, encoder: score_suite(setup, encoder, families=families or FAMILIES, fast=fast),
        finish=lambda folder: write_summary(folder, str(session.run)),
    )
