"""A page of neighbours: one HTML file that a browser opens from disk, with everything in it and nothing fetched.

What the page shows is written by Jinja (the head) and by its script (the rest, from JSON within the page). Names come
from data sets and are hostile until shown otherwise: Jinja escapes, the script sets text only, the JSON cannot end its
element, and a content security policy allows no script, style or picture but the page's own.

Shapes: P images of the page, K neighbours, M points of the map.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
import json
import math
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from msf_faiss.neighbors.page_content import Explorer, Histogram
from msf_faiss.neighbors.records import write_output

MOST_BYTES = 30_000_000
"""No page is larger, with up to some 10,000 images."""

_SCRIPTS = ("theme", "core", "charts", "views", "map", "navigation")
_RESERVE = 500_000  # bytes of the page for its own text, style and script
_PIXELS = 60_000_000  # of all pictures together; photographs take about 0.2 bytes a pixel, 0.3 as base64
_SMALL = 64  # side up to which pictures are shown pixel by pixel, and kept without loss while there is room
_SMALLEST = 16  # side
_QUALITY = 82  # WebP's
_LONGEST_NAME, _LONGEST_CLASS = 240, 80  # characters; longer ones lose their middle
_STEERING = {*"\u061c\u200e\u200f\u2028\u2029", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
_SIMILARITY_STEPS = 100_000  # of a similarity in the page


def write_page(explorer: Explorer, path: Path) -> None:
    """Write the page.

    Raises:
        UserError: if the file cannot be written.
    """
    write_output(path, render_page(explorer))


def render_page(explorer: Explorer) -> str:
    """The page's HTML, valid UTF-8, at most `MOST_BYTES` long.

    Pictures are made smaller, see `picture_side`, and if that is not enough, smaller yet until they fit.
    """
    files = importlib.resources.files("msf_faiss.neighbors") / "page"
    style, script = (files / "page.css").read_text("utf-8"), _script(files)
    data = _json(_contents(explorer))
    pictures, side = _pictures(explorer.nodes.pictures, MOST_BYTES - _RESERVE - len(data.encode()))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": "{:.1%}".format, "count": "{:,.0f}".format, "cosine": "{:.3f}".format}
    environment.filters["shown"] = shown
    statistics = explorer.statistics
    return environment.from_string((files / "page.html.j2").read_text("utf-8")).render(
        explorer=explorer,
        protocol=explorer.protocol,
        statistics=statistics,
        mean_similarity=_mean(statistics.similarity_by_rank),
        mean_age=None if statistics.age is None else _middle(statistics.age),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=data,
        pictures=_json({"side": side, "small": explorer.nodes.pictures[0].width <= _SMALL, "images": pictures}),
    )


def picture_side(side: int, count: int) -> int:
    """Side in pixels at which a page of `count` pictures holds them, `side` or less.

    All together have at most 60 million pixels: 1,600 pictures keep 192 pixels, 3,000 are shown with 141, 10,000 with
    77. Never below 16.
    """
    return min(side, max(_SMALLEST, math.isqrt(_PIXELS // max(1, count))))


def shown(text: str, longest: int = _LONGEST_NAME) -> str:
    """Text that can only be read: what steers a display is replaced, and a long one loses its middle."""
    if len(text) > longest:
        text = f"{text[: 2 * longest // 3]}…{text[-longest // 3 + 1 :]}"
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if letter in _STEERING or unicodedata.category(letter) in ("Cc", "Cs") else letter
        for letter in text
    )


def _script(files: Traversable) -> str:
    """The page's script: one closure, whose theme runs at once and whose other files run when the page is loaded."""
    theme, *others = ((files / f"{name}.js").read_text("utf-8") for name in _SCRIPTS)
    loaded = "\n".join(others)
    return f'"use strict";\n(() => {{\n{theme}\naddEventListener("DOMContentLoaded", () => {{\n{loaded}}});\n}})();\n'


def _contents(explorer: Explorer) -> dict[str, Any]:
    """Everything but the pictures, for the script."""
    nodes, graph, statistics = explorer.nodes, explorer.graph, explorer.statistics
    there = graph.neighbors >= 0  # [P, K]

    def rows(values: Any) -> list[list[int]]:
        return [row[some].tolist() for row, some in zip(np.asarray(values), there, strict=True)]

    return {
        "title": shown(explorer.protocol.name),
        "searched": explorer.protocol.searched,
        "k": explorer.protocol.k,
        "classes": None if explorer.classes is None else [shown(name, _LONGEST_CLASS) for name in explorer.classes],
        "ids": nodes.ids.tolist(),
        "names": [shown(name) for name in nodes.names],
        "labels": nodes.labels.tolist(),
        "neighbors": rows(graph.neighbors),
        "similarities": rows(_steps(graph.similarities)),
        "ages": None if graph.ages is None else rows(graph.ages),
        "complete": graph.complete.astype(int).tolist(),
        "queries": list(explorer.queries),
        "order": explorer.order,
        "statistics": {
            "images": statistics.images,
            "similarity": _histogram(statistics.similarity),
            "age": None if statistics.age is None else _histogram(statistics.age),
            "purityByRank": _finite(statistics.purity_by_rank),
            "similarityByRank": _finite(statistics.similarity_by_rank),
            "chance": statistics.chance,
            "never": statistics.never_retrieved,
            "hubs": [[hub.node, hub.retrieved, hub.matching] for hub in statistics.hubs],
            "purityByClass": [
                [shown(name, _LONGEST_CLASS), purity, images] for name, purity, images in statistics.purity_by_class
            ],
        },
        "evolution": [
            {
                "step": moment.step,
                "epoch": moment.epoch,
                "purity": moment.purity,
                "neighbors": [row[row >= 0].tolist() for row in moment.neighbors],
                "similarities": [
                    steps[row >= 0].tolist()
                    for row, steps in zip(moment.neighbors, _steps(moment.similarities), strict=True)
                ],
            }
            for moment in explorer.evolution
        ],
        "clusters": [
            {
                "size": cluster.size,
                "members": list(cluster.members),
                "name": None if cluster.class_name is None else shown(cluster.class_name, _LONGEST_CLASS),
                "share": cluster.share,
            }
            for cluster in explorer.clusters
        ],
        "map": None
        if explorer.map is None
        else {
            "nodes": explorer.map.nodes.tolist(),
            "positions": np.rint(explorer.map.positions * 10_000).astype(int).tolist(),
        },
    }


def _steps(similarities: Any) -> Any:
    return np.rint(np.asarray(similarities, np.float64) * _SIMILARITY_STEPS).astype(int)


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {
        "edges": [float(f"{edge:.9g}") for edge in histogram.edges],
        "matching": histogram.matching.tolist(),
        "others": histogram.others.tolist(),
    }


def _finite(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 6) for value in values]


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _middle(histogram: Histogram) -> float | None:
    """The mean, as well as bins tell it."""
    counts = histogram.matching + histogram.others
    middles = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    return float((middles * counts).sum() / counts.sum()) if counts.sum() else None


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in, nor begin a comment there."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _pictures(pictures: Sequence[Image.Image], room: int) -> tuple[list[str], int]:
    """Base64 of each picture as WebP, and the side they have; together at most `room` bytes, if 16 pixels allow it."""
    own = pictures[0].width
    side = picture_side(own, len(pictures))
    lossless = side == own <= _SMALL
    while True:
        encoded = _encoded(pictures, side, lossless)
        size = sum(map(len, encoded)) + 3 * len(encoded)  # with quotes and commas
        if size <= room or (side == min(own, _SMALLEST) and not lossless):
            return encoded, side
        if lossless:
            lossless = False
        else:
            side = max(_SMALLEST, min(side - 1, int(side * 0.97 * math.sqrt(max(room, 0) / size))))


def _encoded(pictures: Sequence[Image.Image], side: int, lossless: bool) -> list[str]:
    def one(picture: Image.Image) -> str:
        if picture.width != side:
            picture = picture.resize((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        # Method 2 takes half the time of the default and 3 % more bytes.
        picture.save(buffer, "webp", lossless=lossless, quality=50 if lossless else _QUALITY, method=2)
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    with ThreadPoolExecutor(2) as threads:  # PIL's encoders work outside the interpreter's lock
        return list(threads.map(one, pictures))
