"""Bar charts from the tables of docs/benchmarks.md, so that charts and tables always agree.

`<!-- chart: HEADING | TABLE | COLUMN | UNIT -->` in a page inserts a chart of the table with this number (from 1) below
this heading. COLUMN is the start of a column name; the first cell of a row is its label.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

BENCHMARKS = Path(__file__).parents[1] / "benchmarks.md"
_CHART = re.compile(r"<!-- chart: (.+?) \| (\d+) \| (.+?) \| (.+?) -->")
_NUMBER = re.compile(r"[\d,]+(\.\d+)?")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace each chart comment by its chart."""
    return _CHART.sub(lambda match: chart(match[1], int(match[2]), match[3], match[4]), markdown)


def chart(heading: str, number: int, column: str, unit: str) -> str:
    """Return an HTML figure with one bar per row.

    Raises:
        ValueError: docs/benchmarks.md has no such heading, table or column; this fails the build.
    """
    header, *rows = _table(heading, number)
    place = next((i for i, name in enumerate(header) if name.startswith(column)), None)
    if place is None:
        raise ValueError(f"docs/benchmarks.md: no column {column} in table {number} below {heading}")
    values = [float(_NUMBER.search(row[place])[0].replace(",", "")) for row in rows]
    bars = "".join(
        f"<li><span>{_name(row[0])}</span>"
        f'<span class="bar"><i style="width: {85 * value / max(values):.2f}%"></i><b>{value:,g}</b></span></li>'
        for row, value in zip(rows, values, strict=True)
    )
    return f'<figure class="bars"><figcaption>{html.escape(unit)}</figcaption><ul>{bars}</ul></figure>'


def _table(heading: str, number: int) -> list[list[str]]:
    """Return the cells of a table, header first."""
    _, found, below = BENCHMARKS.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    tables = re.findall(r"(?:^\|.*\n)+", below.partition("\n## ")[0], flags=re.MULTILINE)
    if not found or number > len(tables):
        raise ValueError(f"docs/benchmarks.md: no table {number} below {heading}")
    lines = [line for line in tables[number - 1].splitlines() if not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _name(cell: str) -> str:
    """Convert `code` and **bold** of a cell to HTML."""
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(cell))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
