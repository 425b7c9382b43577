"""`msf-faiss report`."""

import os
from pathlib import Path

import click


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="File to write. Replaces an older report, but no other file.  [default: RUN/report.html; ./report.html for "
    "several runs]",
)
@click.option("--title", metavar="TEXT", help="Title of the page.  [default: the run's name]")
@click.option(
    "--no-neighbors", is_flag=True, help="Omit the neighbours, for which 2,000 images per run are embedded on the CPU."
)
def command(runs: tuple[Path, ...], out: Path | None, title: str | None, no_neighbors: bool) -> None:
    """Write a report of one or several runs as a self-contained HTML page.

    RUN is a run directory, during training or afterwards. The page shows curves, evaluations, config and neighbours,
    and for several runs how their configs differ. The path of the page is printed to stdout.
    """
    from msf_faiss.report.build import write_report

    page = write_report(runs, out, title=title, neighbors=not no_neighbors)
    click.echo(os.fsencode(page))
