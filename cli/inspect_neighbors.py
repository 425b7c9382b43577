"""`msf-faiss inspect-neighbors`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import device_option

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from msf_faiss.checkpoint.format import Checkpoint
    from msf_faiss.neighbors.options import PageOptions
    from msf_faiss.neighbors.page_content import MapMethod
    from msf_faiss.neighbors.records import Inspection, NeighborRecord, QueryRecord, Searched, Summary

_MAX_WIDTH = 24  # characters of a column in the table
_GAP = 2  # characters between columns
_EXTENSIONS = (".html", ".png", ".json")
_SECTIONS = {
    "Queries": ("queries", "worst", "files", "ids"),
    "Search": ("k", "searched", "overrides", "device", "seed"),
    "Output": ("out",),
    "Page": ("page_images", "sample", "evolution", "moments", "clusters", "map_method"),
}


class _SectionedCommand(click.Command):
    """Lists its options in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        records = {option.name: option.get_help_record(ctx) for option in options}
        named = {name for names in _SECTIONS.values() for name in names}
        rest = tuple(name for name in records if name is not None and name not in named)
        for title, names in {**_SECTIONS, "Other": rest}.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := records[name]) is not None])


@click.command(cls=_SectionedCommand)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--queries",
    metavar="N",
    type=click.IntRange(min=1),
    help="Number of random training images, balanced over the classes.  [default: 12]",
)
@click.option("--worst", is_flag=True, help="Instead of random images, use those of lowest purity among --sample.")
@click.option(
    "--query",
    "files",
    metavar="FILE",
    type=click.Path(path_type=Path),
    multiple=True,
    help="An image file. Repeatable.",
)
@click.option(
    "--query-id", "ids", metavar="ID", type=click.IntRange(min=0), multiple=True, help="A training image. Repeatable."
)
@click.option(
    "--k", metavar="K", type=click.IntRange(min=1), default=10, show_default=True, help="Neighbours per query."
)
@click.option(
    "--source",
    "searched",
    type=click.Choice(["bank", "dataset"]),
    default="bank",
    show_default=True,
    help="Search the checkpoint's bank, or all training images, embedded anew.",
)
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="An interactive page (.html), a sheet of pictures (.png) or records (.json). Replaces an existing file.  "
    "[default: RUN/neighbors/step-….html; none for a checkpoint outside a run]",
)
@click.option(
    "--page-images",
    metavar="N",
    type=click.IntRange(min=1),
    default=3000,
    show_default=True,
    help="Images on the page, each with its neighbours.",
)
@click.option(
    "--sample",
    metavar="N",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
    help="Random images for the statistics and --worst; all with --source dataset.",
)
@click.option("--evolution", is_flag=True, help="Show the same queries at earlier checkpoints of the run.")
@click.option(
    "--moments",
    metavar="N",
    type=click.IntRange(min=2),
    default=6,
    show_default=True,
    help="Maximum number of checkpoints of the evolution.",
)
@click.option("--clusters", metavar="N", type=click.IntRange(min=1), help="Show N k-means clusters of the images.")
@click.option(
    "--map", "map_method", type=click.Choice(["pca", "tsne"]), help="Show a map of at most 3,000 images of the page."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of data or views, e.g. --set data.path=FOLDER if the data have moved. Repeatable.",
)
@click.option(
    "--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all random choices."
)
@device_option
def command(
    run: Path,
    queries: int | None,
    worst: bool,
    files: tuple[Path, ...],
    ids: tuple[int, ...],
    k: int,
    searched: Searched,
    out: Path | None,
    page_images: int,
    sample: int,
    evolution: bool,
    moments: int,
    clusters: int | None,
    map_method: MapMethod | None,
    overrides: tuple[str, ...],
    seed: int,
    device: str,
) -> None:
    """See the neighbours that a checkpoint's bank retrieves.

    RUN is a run directory (its newest checkpoint) or a checkpoint directory. Queries are embedded by the target
    encoder; a query's own image is not among its neighbours. A table is printed to stdout, followed by the path of the
    file. The page works offline: images, neighbours and statistics are all in one file.
    """
    if queries is not None and (files or ids):
        raise click.UsageError("--queries selects random images, --query and --query-id name them; give one of them")
    if worst and (files or ids):
        raise click.UsageError("--worst selects the queries, --query and --query-id name them; give one of them")

    from msf_faiss.checkpoint.format import find_checkpoint
    from msf_faiss.device import select_device
    from msf_faiss.neighbors.options import PageOptions

    from .console import stderr, stdout

    if out is not None:
        _check_extension(out)
    checkpoint = find_checkpoint(run)
    if out is None and checkpoint.run_dir is not None:
        suffix = "" if searched == "bank" else f"-{searched}"
        out = checkpoint.run_dir / "neighbors" / f"{checkpoint.path.name}{suffix}.html"
    extension = None if out is None else out.suffix.lower()
    if extension != ".html" and (evolution or clusters or map_method):
        raise click.UsageError("--evolution, --clusters and --map need a page; write one with --out FILE.html")
    console = stderr()
    options = PageOptions(
        queries=queries or 12,
        files=files,
        ids=ids,
        worst=worst,
        k=k,
        searched=searched,
        sample=sample,
        overrides=overrides,
        seed=seed,
        device=select_device(device),
        page_images=page_images,
        moments=moments if evolution else 0,
        clusters=clusters or 0,
        map_method=map_method,
    )
    inspection, write = _inspect(checkpoint, options, extension, lambda line: console.print(line, markup=False))
    _print_table(stdout(), inspection)
    if inspection.missing_neighbors:
        console.print(f"fewer than {k} neighbours, because there are not more other images")
    if out is None:
        console.print("no file written: the checkpoint is not part of a run; name a file with --out")
        return
    write(out)
    click.echo(out)


def _inspect(
    checkpoint: Checkpoint, options: PageOptions, extension: str | None, notify: Callable[[str], object]
) -> tuple[Inspection, Callable[[Path], None]]:
    """The inspection, and a function that writes it in the format of `extension`."""
    if extension == ".html":
        from msf_faiss.neighbors.build_page import build_page
        from msf_faiss.neighbors.page_html import write_page

        inspection, explorer = build_page(checkpoint, options, notify)
        return inspection, partial(write_page, explorer)
    from msf_faiss.neighbors.inspection import inspect
    from msf_faiss.neighbors.records import write_records
    from msf_faiss.neighbors.sheet import write_sheet

    inspection = inspect(checkpoint, options, thumbnails=extension == ".png", notify=notify)
    return inspection, partial(write_sheet if extension == ".png" else write_records, inspection)


def _check_extension(out: Path) -> None:
    from msf_faiss.errors import UserError
    from msf_faiss.files import kind_of

    if out.suffix.lower() not in _EXTENSIONS:
        raise UserError(f"--out {out}: the extension must be .html (page), .png (sheet of pictures) or .json (records)")
    if kind_of(out, "choose another --out") == "folder":
        raise UserError(f"--out {out}: is a folder; name a file in it")


def _print_table(console: Console, inspection: Inspection) -> None:
    console.print(_table(inspection, console.width), soft_wrap=False)
    console.print()
    for line in _summary(inspection):
        console.print(line, markup=False)


def _table(inspection: Inspection, width: int) -> Table:
    """One row per query, with its neighbours in as many columns as fit the terminal, on several lines if needed."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [(_query(query), [_neighbor(neighbor) for neighbor in query.neighbors]) for query in inspection.queries]
    query_width = _max_width([cell for cells, _ in rows for cell in cells])
    neighbor_width = _max_width([cell for _, cells in rows for cell in cells])
    most = max(len(cells) for _, cells in rows)
    columns = max(1, min(most, (width - query_width - _GAP) // (neighbor_width + _GAP)))
    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=False)
    for cell_width in [query_width, *[neighbor_width] * columns]:
        table.add_column(width=cell_width, no_wrap=True, overflow="ellipsis")
    for queries, cells in rows:
        neighbors = [cells[start : start + columns] for start in range(0, len(cells), columns)]
        lines = list(zip_longest(queries, neighbors or [[Text("no other image", "dim")]]))
        for number, (query, line) in enumerate(lines, start=1):
            table.add_row(query, *(line or []), end_section=number == len(lines))
    return table


def _max_width(cells: list[Text]) -> int:
    return min(_MAX_WIDTH, max((line.cell_len for cell in cells for line in cell.split("\n")), default=0))


def _query(query: QueryRecord) -> list[Text]:
    from rich.text import Text

    from msf_faiss.text import replace_unprintable

    name = replace_unprintable(Path(query.name).name) if query.id is None else f"#{query.id}"
    compared = sum(neighbor.matches is not None for neighbor in query.neighbors)
    cell = Text(replace_unprintable(query.class_name) if query.class_name else name, "bold")
    cell.append(f"\n{name}" if query.class_name else "\n", "not bold dim")
    if compared:
        cell.append(f"  {query.matching}/{compared} match", "not bold")
    own = query.own
    if own is None or own.age is None:
        return [cell]
    return [cell, Text(f"own entry {own.similarity:.3f}\nage {own.age:,}", "dim")]


def _neighbor(neighbor: NeighborRecord) -> Text:
    from rich.text import Text

    from msf_faiss.text import replace_unprintable

    mark, style = {True: ("✓ ", "green"), False: ("✗ ", "red"), None: ("", "")}[neighbor.matches]
    text = Text()
    text.append(f"{mark}{neighbor.similarity:.3f} {replace_unprintable(neighbor.class_name or '')}".rstrip(), style)
    age = "" if neighbor.age is None else f", age {neighbor.age:,}"
    text.append(f"\n{' ' * len(mark)}#{neighbor.id}{age}", "dim")
    return text


def _summary(inspection: Inspection) -> list[str]:
    summary, protocol = inspection.summary, inspection.protocol
    lines = [_purity(summary)] if summary.purity is not None else []
    facts = [f"mean similarity {summary.similarity:.3f}"] if summary.similarity is not None else []
    if summary.age is not None:
        facts.append(f"mean age {summary.age:,.0f} entries")
    if protocol.capacity is not None:
        facts.append(f"bank {protocol.entries / protocol.capacity:.0%} full ({protocol.entries:,} entries)")
    else:
        facts.append(f"searched {protocol.entries:,} training images")
    lines.append(", ".join(facts))
    return lines


def _purity(summary: Summary) -> str:
    low, high = summary.purity_interval or (0, 1)
    chance = "" if summary.chance is None else f"; chance {summary.chance:.1%}"
    ranks = [
        f"{rank}: {purity:.0%}"
        for rank, purity in enumerate(summary.purity_by_rank[:10], start=1)
        if purity is not None
    ]
    return (
        f"purity {summary.purity:.1%} (95% interval {low:.1%} to {high:.1%}{chance}) of {summary.images:,} "
        f"{'image' if summary.images == 1 else 'images'}, by rank {'  '.join(ranks)}"
    )
