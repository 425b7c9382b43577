"""`msf-faiss report`."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command(short_help="Write a run's report, or that of several side by side, as one page.")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The page; an older report is replaced, nothing else is.  [default: RUN/report.html; ./report.html for "
    "several runs]",
)
@click.option("--title", metavar="TEXT", help="Of the page.  [default: the run's name]")
@click.option("--no-neighbors", is_flag=True, help="Leave out the neighbours, which take some seconds a run.")
def command(runs: tuple[Path, ...], out: Path | None, title: str | None, no_neighbors: bool) -> None:
    """Write a run's report, or that of several runs side by side, as one page that needs neither network nor server.

    RUN is a run directory, while it trains or afterwards. The page has its curves, evaluations, config and neighbours,
    and of several runs what is different in their configs. Its path goes to stdout.
    """
    from msf_faiss.report.build import write_report

    page = write_report(runs, out, title=title, neighbors=not no_neighbors)
    click.echo(os.fsencode(page))
