"""A gallery of an inspection: one HTML page that needs nothing else, neither a network nor scripts."""

from __future__ import annotations

import base64
import importlib.resources
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from msf_faiss.neighbors.records import Inspection, Summary, write_output

_TILE, _QUERY = 96, 152  # sides of a neighbour and of a query on the page, about, in CSS pixels
_JPEG_QUALITY = 90
_MOST_VALUES = 12  # bars that still have room for their value above them
_MOST_RANKS = 20  # bars that still have room for their rank below them


def write_gallery(inspection: Inspection, path: Path) -> None:
    """Write the inspection as one page: thumbnails are embedded, nothing is loaded, everything named is escaped.

    Raises:
        ValueError: if the inspection has no thumbnails.
        UserError: if the file cannot be written.
    """
    write_output(path, render_gallery(inspection))


def render_gallery(inspection: Inspection) -> str:
    """The page's HTML. See `write_gallery`."""
    thumbnails = inspection.thumbnails
    if thumbnails is None:
        raise ValueError("a gallery needs the thumbnails, which this inspection left out")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": "{:.1%}".format, "count": "{:,.0f}".format, "cosine": "{:.3f}".format}
    template = importlib.resources.files("msf_faiss.neighbors").joinpath("gallery.html.j2").read_text("utf-8")
    return environment.from_string(template).render(
        inspection=inspection,
        protocol=inspection.protocol,
        summary=inspection.summary,
        chart=_chart(inspection.summary),
        query_images=[_data_uri(image) for image in thumbnails.queries],
        images={index: _data_uri(image) for index, image in thumbnails.images.items()},
        pixelated=thumbnails.small,
        tile=thumbnails.shown(_TILE),
        query_tile=thumbnails.shown(_QUERY),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bar:
    """A bar of the chart, in its own units, from the top left."""

    x: float
    y: float
    width: float
    height: float
    rank: int
    value: float | None  # None: nothing could be compared at this rank
    shows_rank: bool

    @property
    def center(self) -> float:
        return round(self.x + self.width / 2, 2)


def _chart(summary: Summary) -> dict[str, Any]:
    """Bars by rank: of the purity, or of the similarity where nothing has labels."""
    labelled = summary.purity is not None
    values = summary.purity_by_rank if labelled else summary.similarity_by_rank
    chance = summary.chance if labelled else None
    highest = max([*(value for value in values if value is not None), chance or 0.0], default=0.0)
    limit = next(limit for limit in (0.25, 0.5, 1.0) if highest <= limit or limit == 1.0)
    base, top, width = 150.0, 30.0, 440.0
    unit = (base - top) / limit
    step = min(width / max(1, len(values)), 64.0)
    every = -(-len(values) // _MOST_RANKS)
    bars = []
    for place, value in enumerate(values):
        height = max(0.0, value or 0.0) * unit  # a negative similarity has no height
        bars.append(
            _Bar(
                x=round((place + 0.12) * step, 2),
                y=round(base - height, 2),
                width=round(0.76 * step, 2),
                height=round(height, 2),
                rank=place + 1,
                value=value,
                shows_rank=place % every == 0,
            )
        )
    return {
        "title": "Purity by rank" if labelled else "Similarity by rank",
        "percent": labelled,
        "bars": bars,
        "shows_values": len(values) <= _MOST_VALUES,
        "width": width,
        "base": base,
        "top": top,
        "limit": limit,
        "chance": chance,
        "chance_y": None if chance is None else round(base - chance * unit, 2),
    }


def _data_uri(image: Image.Image) -> str:
    """The image in the page itself, as PNG or JPEG, whichever is smaller."""
    candidates = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": _JPEG_QUALITY, "subsampling": 0})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        candidates.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, encoded = min(candidates)
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode('ascii')}"
