"""`msf-faiss inspect-neighbors`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from msf_faiss.neighbors.records import Inspection, NeighborRecord, QueryRecord, Searched, Summary

_WIDEST = 24  # characters of a column in the table
_GAP = 2  # between two columns
_ENDINGS = (".html", ".png", ".json")
_SECTIONS = {
    "Queries": ("queries", "worst", "files", "ids"),
    "Search": ("k", "searched", "overrides", "device", "seed"),
    "Output": ("out",),
    "The page": ("page_images", "sample", "evolution", "moments", "clusters", "map_method"),
}


class _Sectioned(click.Command):
    """Lists its options by what they are about."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        records = {option.name: option.get_help_record(ctx) for option in options}
        named = {name for names in _SECTIONS.values() for name in names}
        rest = tuple(name for name in records if name is not None and name not in named)
        for title, names in {**_SECTIONS, "Other": rest}.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := records[name]) is not None])


@click.command(cls=_Sectioned, short_help="See the neighbours that a checkpoint's bank retrieves.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--queries",
    metavar="N",
    type=click.IntRange(min=1),
    help="Random training images to ask for, as many of each class as there can be.  [default: 12]",
)
@click.option("--worst", is_flag=True, help="Rather than random images, those of the lowest purity among --sample.")
@click.option(
    "--query",
    "files",
    metavar="FILE",
    type=click.Path(path_type=Path),
    multiple=True,
    help="An image file. Repeatable.",
)
@click.option(
    "--query-id",
    "ids",
    metavar="ID",
    type=click.IntRange(min=0),
    multiple=True,
    help="A training image, by number. Repeatable.",
)
@click.option(
    "--k", metavar="K", type=click.IntRange(min=1), default=10, show_default=True, help="Neighbours of each query."
)
@click.option(
    "--source",
    "searched",
    type=click.Choice(["bank", "dataset"]),
    default="bank",
    show_default=True,
    help="Search the checkpoint's bank, or all training images, embedded now.",
)
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A page to click through (.html), a picture sheet (.png) or records (.json); an older file is replaced.  "
    "[default: RUN/neighbors/step-….html; none for a checkpoint outside a run]",
)
@click.option(
    "--page-images",
    metavar="N",
    type=click.IntRange(min=1),
    default=3000,
    show_default=True,
    help="Images that can be clicked, each with its neighbours.",
)
@click.option(
    "--sample",
    metavar="N",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
    help="Random images for the statistics and --worst; all with --source dataset.",
)
@click.option("--evolution", is_flag=True, help="The same queries over the checkpoints of the run, up to this one.")
@click.option(
    "--moments",
    metavar="N",
    type=click.IntRange(min=2),
    default=6,
    show_default=True,
    help="Checkpoints of an evolution at most, at even distances.",
)
@click.option("--clusters", metavar="K", type=click.IntRange(min=1), help="K clusters of all that is searched.")
@click.option(
    "--map", "map_method", type=click.Choice(["pca", "tsne"]), help="A map of the page's images, 3,000 at most."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Where the data are, if they have moved, e.g. --set data.path=FOLDER. Repeatable.",
)
@click.option(
    "--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True, help="Of all random choices."
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: CUDA where there is a GPU.",
)
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
    map_method: Literal["pca", "tsne"] | None,
    overrides: tuple[str, ...],
    seed: int,
    device: str,
) -> None:
    """See the neighbours that a checkpoint's bank retrieves.

    RUN is a run directory (its newest checkpoint) or a checkpoint directory. Queries are embedded by the target
    encoder; the query's own image is left out of its neighbours. The table goes to stdout, and after it the path of
    the file that was written. The page needs no network: its images, their neighbours and statistics are all in it.
    """
    if queries is not None and (files or ids):
        raise click.UsageError("--queries chooses at random; give either it, or --query and --query-id")
    if worst and (files or ids):
        raise click.UsageError("--worst chooses the queries; give either it, or --query and --query-id")
    if out is not None:
        _refuse_ending(out)

    from msf_faiss.checkpoint.format import find_checkpoint
    from msf_faiss.device import select_device

    from .console import stderr, stdout

    checkpoint = find_checkpoint(run)
    if out is None and checkpoint.run_dir is not None:
        suffix = "" if searched == "bank" else f"-{searched}"
        out = checkpoint.run_dir / "neighbors" / f"{checkpoint.path.name}{suffix}.html"
    paged = out is not None and out.suffix.lower() == ".html"
    if not paged and (evolution or clusters or map_method):
        raise click.UsageError("--evolution, --clusters and --map are parts of a page; --out FILE.html writes one")
    console = stderr()
    asked: dict[str, Any] = {
        "queries": queries or 12,
        "files": files,
        "ids": ids,
        "worst": worst,
        "k": k,
        "searched": searched,
        "sample": sample,
        "overrides": overrides,
        "seed": seed,
        "device": select_device(device),
    }
    write: Callable[[Path], None]
    if paged:
        from msf_faiss.neighbors.build_page import explore
        from msf_faiss.neighbors.page_html import write_page

        inspection, explorer = explore(
            checkpoint,
            **asked,
            page_images=page_images,
            moments=moments if evolution else 0,
            clusters=clusters or 0,
            map_method=map_method,
            notify=lambda line: console.print(line, markup=False),
        )
        write = partial(write_page, explorer)
    else:
        from msf_faiss.neighbors.inspection import inspect
        from msf_faiss.neighbors.records import write_records
        from msf_faiss.neighbors.sheet import write_sheet

        pictured = out is not None and out.suffix.lower() == ".png"
        inspection = inspect(checkpoint, **asked, thumbnails=pictured)
        write = partial(write_sheet if pictured else write_records, inspection)
    _print_table(stdout(), inspection)
    if inspection.short_of:
        console.print(f"{k} neighbours were asked for, but there are not so many other images to retrieve")
    if out is None:
        console.print("no file written: the checkpoint lies outside a run; --out names a file", markup=False)
        return
    write(out)
    click.echo(out)


def _refuse_ending(out: Path) -> None:
    from msf_faiss.errors import UserError

    if out.suffix.lower() not in _ENDINGS:
        raise UserError(
            f"--out {out}: the ending says what to write: .html is a page, .png a picture sheet, .json records"
        )


def _print_table(console: Console, inspection: Inspection) -> None:
    console.print(_table(inspection, console.width), soft_wrap=False)
    console.print()
    for line in _summary(inspection):
        console.print(line, markup=False)


def _table(inspection: Inspection, width: int) -> Table:
    """A row a query; its neighbours fill as many columns as the terminal has room for, and then further lines."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [(_query(query), [_neighbor(neighbor) for neighbor in query.neighbors]) for query in inspection.queries]
    asked = _widest([cell for cells, _ in rows for cell in cells])
    found = _widest([cell for _, cells in rows for cell in cells])
    most = max(len(cells) for _, cells in rows)
    columns = max(1, min(most, (width - asked - _GAP) // (found + _GAP)))
    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=False)
    for cell_width in [asked, *[found] * columns]:
        table.add_column(width=cell_width, no_wrap=True, overflow="ellipsis")
    for queries, cells in rows:
        neighbors = [cells[start : start + columns] for start in range(0, len(cells), columns)]
        lines = list(zip_longest(queries, neighbors or [[Text("no other image", "dim")]]))
        for number, (query, line) in enumerate(lines, start=1):
            table.add_row(query, *(line or []), end_section=number == len(lines))
    return table


def _widest(cells: list[Text]) -> int:
    return min(_WIDEST, max((line.cell_len for cell in cells for line in cell.split("\n")), default=0))


def _query(query: QueryRecord) -> list[Text]:
    from rich.text import Text

    from msf_faiss.text import replace_unprintable

    name = replace_unprintable(Path(query.name).name) if query.id is None else f"#{query.id}"
    compared = sum(neighbor.matches is not None for neighbor in query.neighbors)
    asked = Text(replace_unprintable(query.class_name) if query.class_name else name, "bold")
    asked.append(f"\n{name}" if query.class_name else "\n", "not bold dim")
    if compared:
        asked.append(f"  {query.matching}/{compared} match", "not bold")
    own = query.own
    if own is None or own.age is None:
        return [asked]
    return [asked, Text(f"own entry {own.similarity:.3f}\nage {own.age:,}", "dim")]


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
    chance = "" if summary.chance is None else f" (chance {summary.chance:.1%})"
    ranks = [
        f"{rank}: {purity:.0%}"
        for rank, purity in enumerate(summary.purity_by_rank[:10], start=1)
        if purity is not None
    ]
    return f"purity {summary.purity:.1%}{chance}, by rank {'  '.join(ranks)}"
