"""A picture of an inspection: one row a query, the query at the left, its neighbours to the right of it."""

from __future__ import annotations

import io
import math
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from msf_faiss.neighbors.records import Inspection, NeighborRecord, QueryRecord, write_output
from msf_faiss.text import replace_unprintable

_TILE = 112  # side of a picture, about
_COLUMNS = 10  # neighbours in a line; further ones go into the next
_FRAME = 4  # width of the coloured frame, outside of the picture
_GAP = 14  # between two frames
_LINE = 19  # height of a line of text
_TEXT = 2 * _LINE + 6  # below a picture: two lines
_MARGIN = 32
_HEADER = 92
_LEAST_WIDTH = 720
_MARK = 22  # side of a tick or a cross

_PAPER = "#ffffff"
_INK = "#1c1b1a"
_MUTED = "#6b6865"
_RULE = "#e6e3df"
_NEUTRAL = "#c9c5c0"
_MATCH = "#0f766e"
_MISMATCH = "#c2410c"

Font = ImageFont.FreeTypeFont


def write_sheet(inspection: Inspection, path: Path) -> None:
    """Draw the inspection as a PNG. Frames say whether labels match by colour and by a mark, a tick or a cross.

    Raises:
        ValueError: if the inspection has no thumbnails.
        UserError: if the file cannot be written.
    """
    buffer = io.BytesIO()
    draw_sheet(inspection).save(buffer, "PNG", optimize=True)
    write_output(path, buffer.getvalue())


def draw_sheet(inspection: Inspection) -> Image.Image:
    """The picture, RGB. See `write_sheet`."""
    thumbnails = inspection.thumbnails
    if thumbnails is None:
        raise ValueError("a sheet needs the thumbnails, which this inspection left out")
    side = thumbnails.shown(_TILE)
    step = side + 2 * _FRAME + _GAP
    columns = max(1, min(_COLUMNS, max(len(query.neighbors) for query in inspection.queries)))
    lines = [max(1, math.ceil(len(query.neighbors) / columns)) for query in inspection.queries]
    left = _MARGIN + step + 2 * _GAP  # of the neighbours
    width = max(left + columns * step - _GAP + _MARGIN, _LEAST_WIDTH)
    height = _HEADER + sum(_GAP + count * (step + _TEXT) for count in lines) + _MARGIN
    sheet = _Sheet(width, height, side)
    sheet.header(inspection)
    top = _HEADER
    for query, image, count in zip(inspection.queries, thumbnails.queries, lines, strict=True):
        sheet.rule(top)
        top += _GAP
        sheet.query(query, image, _MARGIN, top, room=step + _GAP)
        for place, neighbor in enumerate(query.neighbors):
            line, column = divmod(place, columns)
            sheet.neighbor(neighbor, thumbnails.images[neighbor.id], left + column * step, top + line * (step + _TEXT))
        if not query.neighbors:
            sheet.text(
                "there is no other image to retrieve", left, top + side // 2, _font(15), _MUTED, room=width - left
            )
        top += count * (step + _TEXT)
    return sheet.image


class _Sheet:
    """The sheet while it is drawn. All places are in pixels, from the top left corner of what is drawn."""

    def __init__(self, width: int, height: int, side: int) -> None:
        self.image = Image.new("RGB", (width, height), _PAPER)
        self._draw = ImageDraw.Draw(self.image)
        self._side = side
        self._framed = side + 2 * _FRAME

    def header(self, inspection: Inspection) -> None:
        protocol, summary = inspection.protocol, inspection.summary
        where = "entries of the bank" if protocol.searched == "bank" else "training images"
        facts = [f"{summary.queries} queries among {protocol.entries:,} {where}"]
        if summary.purity is not None:
            chance = "" if summary.chance is None else f" (chance {summary.chance:.1%})"
            facts.append(f"purity {summary.purity:.1%}{chance}")
        if summary.similarity is not None:
            facts.append(f"mean similarity {summary.similarity:.3f}")
        if summary.age is not None:
            facts.append(f"mean age {summary.age:,.0f} entries")
        room = self.image.width - 2 * _MARGIN
        title = f"{protocol.name}  ·  step {protocol.step:,}"
        self.text(title, _MARGIN, 24, _font(22, bold=True), _INK, room)
        self.text("  ·  ".join(facts), _MARGIN, 58, _font(15), _MUTED, room)

    def rule(self, y: int) -> None:
        self._draw.line((_MARGIN, y, self.image.width - _MARGIN, y), _RULE)

    def query(self, query: QueryRecord, image: Image.Image, x: int, y: int, room: int) -> None:
        self._picture(image, x, y, _INK)
        name = query.class_name or (Path(query.name).name if query.id is None else f"image {query.id:,}")
        compared = sum(neighbor.matches is not None for neighbor in query.neighbors)
        y += self._framed + 5
        self.text(name, x, y, _font(15, bold=True), _INK, room)
        if compared:
            self.text(f"{query.matching} of {compared} match", x, y + _LINE, _font(14), _MUTED, room)

    def neighbor(self, neighbor: NeighborRecord, image: Image.Image, x: int, y: int) -> None:
        color = {True: _MATCH, False: _MISMATCH, None: _NEUTRAL}[neighbor.matches]
        self._picture(image, x, y, color)
        if neighbor.matches is not None:
            self.image.paste(_mark(neighbor.matches, color), (x + self._framed - _MARK, y))
        y += self._framed + 5
        self.text(f"{neighbor.similarity:.3f}", x, y, _font(15, bold=True), _INK, self._framed)
        self.text(neighbor.class_name or f"{neighbor.id:,}", x, y + _LINE, _font(14), _MUTED, self._framed)

    def text(self, text: str, x: int, y: int, font: Font, color: str, room: int) -> None:
        """One line, its end left out if it is wider than `room`."""
        text = replace_unprintable(text)
        if font.getlength(text) > room:
            keep = len(text) - 1
            while keep and font.getlength(text[:keep] + "…") > room:
                keep -= 1
            text = text[:keep] + "…"
        self._draw.text((x, y), text, color, font)

    def _picture(self, image: Image.Image, x: int, y: int, color: str) -> None:
        self._draw.rectangle((x, y, x + self._framed - 1, y + self._framed - 1), fill=color)
        sampling = Image.Resampling.NEAREST if self._side >= image.width else Image.Resampling.LANCZOS
        self.image.paste(image.resize((self._side, self._side), sampling), (x + _FRAME, y + _FRAME))


def _mark(matches: bool, color: str) -> Image.Image:
    """A tick or a cross, drawn four times as large and reduced, for smooth edges."""
    mark = Image.new("RGB", (88, 88), color)
    draw = ImageDraw.Draw(mark)
    strokes = [[(24, 46), (39, 61), (66, 28)]] if matches else [[(28, 28), (60, 60)], [(60, 28), (28, 60)]]
    for stroke in strokes:
        draw.line(stroke, "white", width=11, joint="curve")
    return mark.resize((_MARK, _MARK), Image.Resampling.LANCZOS)


@cache
def _font(size: int, *, bold: bool = False) -> Font:
    """DejaVu Sans, from the package: Pillow's own font has no letters beyond ASCII."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(__file__).with_name("fonts") / name), size)
