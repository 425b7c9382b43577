"""`msf-faiss eval-all`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .eval_session import EpochLines, Session, options

if TYPE_CHECKING:
    from msf_faiss.evaluate.everything import Part


@click.command(short_help="Run every evaluation that the data allow, and write them on one page.")
@options("online", "target", "weights", "untrained", "pixels", every=True)
@click.option(
    "--only",
    "parts",
    type=click.Choice(["knn", "linear", "semi", "transfer"]),
    multiple=True,
    help="Run these alone. Repeatable.  [default: all]",
)
@click.option(
    "--fast",
    is_flag=True,
    help="A linear layer on features that are computed once, no fine-tuning, every fourth penalty.",
)
def command(session: Session, parts: tuple[Part, ...], fast: bool) -> int:
    """Run every evaluation that the data allow, and write them on one page.

    RUN is a run directory (its newest checkpoint), a checkpoint directory, or a file of weights with --config. kNN,
    linear layer, fine-tuning with 1 % and 10 % of the labels and logistic regression, each beside the untrained
    network; the page is summary.md, beside it summary.json, in the folder of the results, earlier ones among them.
    """
    from msf_faiss.evaluate.everything import PARTS, score_everything
    from msf_faiss.evaluate.summary import write_summary

    from .console import stderr

    def finish(folder: Path) -> None:
        session.say(f"saved {write_summary(folder, str(session.run))}")

    with stderr().status("") as status:
        lines = EpochLines(status)
        return session.evaluate(
            lambda setup, encoder: score_everything(
                setup,
                encoder,
                parts=parts or PARTS,
                fast=fast,
                batch_size=session.batch_size,
                on_epoch=lines,
                notify=session.say,
            ),
            finish=finish,
        )
