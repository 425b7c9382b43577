"""An inspection as a PNG: one row for each query, with its neighbours to its right. All sizes are in pixels."""

import io
import math
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from msf_faiss.neighbors.records import Inspection, NeighborRecord, QueryRecord, write_output
from msf_faiss.text import replace_unprintable

_TILE = 112  # approximate side of a picture
_COLUMNS = 10  # neighbours in a line; a query with more has several lines
_FRAME = 4  # width of the coloured frame around a picture
_GAP = 14  # between frames
_TEXT_LINE = 19
_CAPTION = 2 * _TEXT_LINE + 6
_MARGIN = 32
_HEADER = 92
_MIN_WIDTH = 720
_MARK = 22  # side of a tick or cross

_PAPER = "#ffffff"
_INK = "#1c1b1a"
_MUTED = "#6b6865"
_RULE = "#e6e3df"
_NEUTRAL = "#c9c5c0"
_MATCH = "#0f766e"
_MISMATCH = "#c2410c"

_Font = ImageFont.FreeTypeFont


def write_sheet(inspection: Inspection, path: Path) -> None:
    """Write the inspection as a PNG.

    The frame of a neighbour shows by its colour and by a tick or cross whether it has the query's label.

    Raises:
        ValueError: if the inspection has no thumbnails.
        UserError: if the file cannot be written.
    """
    buffer = io.BytesIO()
    draw_sheet(inspection).save(buffer, "PNG", optimize=True)
    write_output(path, buffer.getvalue())


def draw_sheet(inspection: Inspection) -> Image.Image:
    """Return the sheet as an RGB image; see `write_sheet`."""
    thumbnails = inspection.thumbnails
    if thumbnails is None:
        raise ValueError("a sheet needs thumbnails, but this inspection has none")
    side = thumbnails.shown(_TILE)
    step = side + 2 * _FRAME + _GAP
    columns = max(1, min(_COLUMNS, max(len(query.neighbors) for query in inspection.queries)))
    lines = [max(1, math.ceil(len(query.neighbors) / columns)) for query in inspection.queries]
    left = _MARGIN + step + 2 * _GAP  # edge of the neighbours
    width = max(left + columns * step - _GAP + _MARGIN, _MIN_WIDTH)
    height = _HEADER + sum(_GAP + count * (step + _CAPTION) for count in lines) + _MARGIN
    sheet = _Sheet(width, height, side)
    sheet.header(inspection)
    top = _HEADER
    for query, image, count in zip(inspection.queries, thumbnails.queries, lines, strict=True):
        sheet.rule(top)
        top += _GAP
        sheet.query(query, image, _MARGIN, top, step + _GAP)
        for place, neighbor in enumerate(query.neighbors):
            line, column = divmod(place, columns)
            sheet.neighbor(
                neighbor, thumbnails.images[neighbor.id], left + column * step, top + line * (step + _CAPTION)
            )
        if not query.neighbors:
            sheet.text("no other images to retrieve", left, top + side // 2, _font(15), _MUTED, width - left)
        top += count * (step + _CAPTION)
    return sheet.image


class _Sheet:
    """A sheet being drawn. `x` and `y` are the top left corner of an element, `max_width` the space for its text."""

    def __init__(self, width: int, height: int, side: int) -> None:
        self.image = Image.new("RGB", (width, height), _PAPER)
        self._draw = ImageDraw.Draw(self.image)
        self._side = side
        self._framed = side + 2 * _FRAME

    def header(self, inspection: Inspection) -> None:
        protocol, summary = inspection.protocol, inspection.summary
        searched = "bank entries" if protocol.searched == "bank" else "training images"
        facts = [f"{len(inspection.queries)} queries among {protocol.entries:,} {searched}"]
        if summary.purity is not None and summary.purity_interval is not None:
            low, high = summary.purity_interval
            chance = "" if summary.chance is None else f"; chance {summary.chance:.1%}"
            facts.append(f"purity of {summary.images:,} images {summary.purity:.1%} ({low:.1%} to {high:.1%}{chance})")
        if summary.similarity is not None:
            facts.append(f"mean similarity {summary.similarity:.3f}")
        if summary.age is not None:
            facts.append(f"mean age {summary.age:,.0f} entries")
        max_width = self.image.width - 2 * _MARGIN
        title = f"{protocol.name}  ·  step {protocol.step:,}"
        self.text(title, _MARGIN, 24, _font(22, bold=True), _INK, max_width)
        self.text("  ·  ".join(facts), _MARGIN, 58, _font(15), _MUTED, max_width)

    def rule(self, y: int) -> None:
        self._draw.line((_MARGIN, y, self.image.width - _MARGIN, y), _RULE)

    def query(self, query: QueryRecord, image: Image.Image, x: int, y: int, max_width: int) -> None:
        self._picture(image, x, y, _INK)
        name = query.class_name or (Path(query.name).name if query.id is None else f"image {query.id:,}")
        compared = sum(neighbor.matches is not None for neighbor in query.neighbors)
        y += self._framed + 5
        self.text(name, x, y, _font(15, bold=True), _INK, max_width)
        if compared:
            self.text(f"{query.matching} of {compared} match", x, y + _TEXT_LINE, _font(14), _MUTED, max_width)

    def neighbor(self, neighbor: NeighborRecord, image: Image.Image, x: int, y: int) -> None:
        color = {True: _MATCH, False: _MISMATCH, None: _NEUTRAL}[neighbor.matches]
        self._picture(image, x, y, color)
        if neighbor.matches is not None:
            self.image.paste(_mark(neighbor.matches, color), (x + self._framed - _MARK, y))
        y += self._framed + 5
        self.text(f"{neighbor.similarity:.3f}", x, y, _font(15, bold=True), _INK, self._framed)
        self.text(neighbor.class_name or f"{neighbor.id:,}", x, y + _TEXT_LINE, _font(14), _MUTED, self._framed)

    def text(self, text: str, x: int, y: int, font: _Font, color: str, max_width: int) -> None:
        """Draw one line of text, cut off with an ellipsis if it is too wide."""
        text = replace_unprintable(text)
        if font.getlength(text) > max_width:
            while text and font.getlength(text + "…") > max_width:
                text = text[:-1]
            text += "…"
        self._draw.text((x, y), text, color, font)

    def _picture(self, image: Image.Image, x: int, y: int, color: str) -> None:
        self._draw.rectangle((x, y, x + self._framed - 1, y + self._framed - 1), fill=color)
        sampling = Image.Resampling.NEAREST if self._side >= image.width else Image.Resampling.LANCZOS
        self.image.paste(image.resize((self._side, self._side), sampling), (x + _FRAME, y + _FRAME))


def _mark(matches: bool, color: str) -> Image.Image:
    """Return a tick or cross, drawn four times as large and reduced for smooth edges."""
    mark = Image.new("RGB", (88, 88), color)
    draw = ImageDraw.Draw(mark)
    strokes = [[(24, 46), (39, 61), (66, 28)]] if matches else [[(28, 28), (60, 60)], [(60, 28), (28, 60)]]
    for stroke in strokes:
        draw.line(stroke, "white", width=11, joint="curve")
    return mark.resize((_MARK, _MARK), Image.Resampling.LANCZOS)


@cache
def _font(size: int, *, bold: bool = False) -> _Font:
    """Return DejaVu Sans from this package, since Pillow's own font covers only ASCII."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(__file__).with_name("fonts") / name), size)
