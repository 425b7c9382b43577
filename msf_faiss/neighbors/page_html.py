"""The page of neighbours: one HTML file that works from disk and fetches nothing.

Jinja renders the head of the page; its script builds the rest from JSON embedded in it. Names come from data sets and
may be hostile, so Jinja escapes them, the script inserts them as text only, and the JSON cannot close its element. A
content security policy forbids any script, style or image except the page's own.

Shapes: P images of the page, K neighbours, M points of the map.
"""

import base64
import hashlib
import importlib.resources
import io
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from msf_faiss.neighbors.page_content import Confusion, Explorer, Histogram
from msf_faiss.neighbors.records import write_output

_SCRIPTS = ["theme", "core", "selection", "charts", "review", "views", "clusters", "map_colors", "map", "navigation"]
_MAX_PIXELS = 60_000_000  # of all pictures together; photographs take about 0.2 bytes a pixel, 0.3 as base64
_SMALL_SIDE = 64  # pictures up to this side are shown pixel by pixel, and kept lossless while they fit
_MIN_SIDE = 16
_QUALITY = 82  # WebP's
_MAX_NAME, _MAX_CLASS_NAME = 480, 80  # characters; longer ones lose their middle
_BIDI_CONTROLS = {*"\u061c\u200e\u200f\u2028\u2029", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
_SIMILARITY_STEPS = 100_000  # similarities are written as integers, in steps of 1e-5


def write_page(explorer: Explorer, path: Path) -> None:
    """Write the page.

    Raises:
        UserError: if the file cannot be written.
    """
    write_output(path, render_page(explorer))


def render_page(explorer: Explorer, max_bytes: int = 30_000_000) -> str:
    """Return the page's HTML: valid UTF-8, at most `max_bytes` long with up to about 10,000 images.

    Pictures are reduced to `_picture_side`, and further if the page would still be too large.
    """
    files = importlib.resources.files("msf_faiss.neighbors") / "page_assets"
    style, script = (files / "page.css").read_text("utf-8"), _join_scripts(files)
    environment = html_environment()
    environment.filters["displayable"] = displayable
    statistics = explorer.statistics
    template = environment.from_string((files / "page.html.j2").read_text("utf-8"))
    render = partial(
        template.render,
        explorer=explorer,
        protocol=explorer.protocol,
        statistics=statistics,
        summary=statistics.summary,
        style=style,
        script=script,
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
        data=_to_json(_page_data(explorer)),
    )
    size_without_pictures = len(render(pictures="").encode())
    return render(pictures=_fit_pictures(explorer.nodes.pictures, max_bytes - size_without_pictures))


def html_environment() -> Environment:
    """Return a Jinja environment that escapes all values and refuses undefined ones."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": "{:.1%}".format, "count": "{:,.0f}".format, "cosine": "{:.3f}".format}
    return environment


def csp_hash(source: str) -> str:
    """Return the hash by which a Content-Security-Policy allows an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _picture_side(side: int, count: int) -> int:
    """Return the side in pixels, at most `side`, at which a page embeds `count` pictures.

    Together they have at most 60 million pixels: 1,600 pictures keep 192 pixels, 3,000 get 141 and 10,000 get 77. Never
    below 16.
    """
    return min(side, max(_MIN_SIDE, math.isqrt(_MAX_PIXELS // max(1, count))))


def displayable(text: str, max_length: int = _MAX_NAME) -> str:
    """Replace control characters, text-direction controls included, and shorten long text in the middle."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if letter in _BIDI_CONTROLS or unicodedata.category(letter) in ("Cc", "Cs")
        else letter
        for letter in _shorten(text, max_length)
    )


def _shorten(text: str, max_length: int = _MAX_NAME) -> str:
    if len(text) <= max_length:
        return text
    return f"{text[: 2 * max_length // 3]}…{text[-max_length // 3 + 1 :]}"


def _join_scripts(files: Traversable) -> str:
    """One closure: the theme runs at once, the other files when the document is complete."""
    theme, *others = ((files / f"{name}.js").read_text("utf-8") for name in _SCRIPTS)
    page = "\n".join(others)
    return f'"use strict";\n(() => {{\n{theme}\naddEventListener("DOMContentLoaded", () => {{\n{page}}});\n}})();\n'


def _page_data(explorer: Explorer) -> dict[str, Any]:
    """Return all that the script needs except the pictures."""
    nodes, graph, statistics = explorer.nodes, explorer.graph, explorer.statistics

    def class_name(name: str) -> str:
        return displayable(name, _MAX_CLASS_NAME)

    return {
        "title": displayable(explorer.protocol.name),
        "searched": explorer.protocol.searched,
        "k": explorer.protocol.k,
        "classes": None if explorer.classes is None else [class_name(name) for name in explorer.classes],
        "ids": nodes.ids.tolist(),
        # As they are, so that they can be copied; the script replaces control characters where it shows them.
        "names": [re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", _shorten(name)) for name in nodes.names],
        "labels": nodes.labels.tolist(),
        "neighbors": _present(graph.neighbors, graph.neighbors),
        "similarities": _present(_quantize(graph.similarities), graph.neighbors),
        "ages": None if graph.ages is None else _present(graph.ages, graph.neighbors),
        "complete": graph.complete.astype(int).tolist(),
        "queries": list(explorer.queries),
        "order": explorer.order,
        "statistics": {
            "similarity": _histogram(statistics.similarity),
            "age": None if statistics.age is None else _histogram(statistics.age),
            "purityByRank": _rounded(statistics.summary.purity_by_rank),
            "similarityByRank": _rounded(statistics.summary.similarity_by_rank),
            "chance": statistics.summary.chance,
            "never": statistics.never_retrieved,
            "hubs": [[hub.node, hub.retrieved, hub.matching] for hub in statistics.hubs],
            "images": statistics.summary.images,
            "purityByClass": [
                [class_name(row.name), row.purity, row.images, *row.interval] for row in statistics.purity_by_class
            ],
            "confusion": None if statistics.confusion is None else _confusion(statistics.confusion),
        },
        "review": {
            "pairs": [[one, two, round(cosine * _SIMILARITY_STEPS)] for one, two, cosine in explorer.pairs],
            "outliers": [[node, round(mean * _SIMILARITY_STEPS)] for node, mean in explorer.outliers],
        },
        "evolution": [
            {
                "step": moment.step,
                "epoch": moment.epoch,
                "images": moment.images,
                "purity": moment.purity,
                "interval": moment.purity_interval,
                "neighbors": _present(moment.neighbors, moment.neighbors),
                "similarities": _present(_quantize(moment.similarities), moment.neighbors),
            }
            for moment in explorer.evolution
        ],
        "clusters": [
            {
                "size": cluster.size,
                "members": list(cluster.members),
                "classes": [[class_name(name), share] for name, share in cluster.classes],
            }
            for cluster in explorer.clusters
        ],
        "clusterOf": [] if explorer.cluster_of is None else explorer.cluster_of.tolist(),
        "map": None
        if explorer.map is None
        else {
            "nodes": explorer.map.nodes.tolist(),
            "positions": np.rint(explorer.map.positions * 10_000).astype(int).tolist(),
        },
    }


def _present(values: NDArray[Any], neighbors: NDArray[np.int64]) -> list[list[int]]:
    """Return the rows of `values` [.., K] where there is a neighbour, as lists of up to K."""
    return [row[nodes >= 0].tolist() for row, nodes in zip(values, neighbors, strict=True)]


def _quantize(similarities: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.rint(similarities.astype(np.float64) * _SIMILARITY_STEPS).astype(np.int64)


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {
        "edges": [float(f"{edge:.9g}") for edge in histogram.edges],
        "matching": histogram.matching.tolist(),
        "others": histogram.others.tolist(),
    }


def _confusion(confusion: Confusion) -> dict[str, Any]:
    return {
        "labels": confusion.labels.tolist(),
        "counts": confusion.counts.tolist(),
        "totals": confusion.totals.tolist(),
        "present": confusion.present,
    }


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 6) for value in values]


def _to_json(value: Any) -> str:
    """Return JSON that can neither close its element nor open a comment in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _fit_pictures(pictures: Sequence[Image.Image], max_bytes: int) -> str:
    """Return JSON of the pictures' base64 and side, at most `max_bytes` long unless even 16 pixels need more."""
    own_side = pictures[0].width
    side = _picture_side(own_side, len(pictures))
    lossless = side == own_side <= _SMALL_SIDE
    while True:
        images = _encode_pictures(pictures, side, lossless)
        text = _to_json({"side": side, "small": own_side <= _SMALL_SIDE, "images": images})
        if len(text) <= max_bytes or (side == min(own_side, _MIN_SIDE) and not lossless):
            return text
        if lossless:
            lossless = False
        else:
            side = max(_MIN_SIDE, min(side - 1, int(side * 0.97 * math.sqrt(max(max_bytes, 0) / len(text)))))


def _encode_pictures(pictures: Sequence[Image.Image], side: int, lossless: bool) -> list[str]:
    def encode(picture: Image.Image) -> str:
        if picture.width != side:
            picture = picture.resize((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        # Method 2 takes half the time of the default for 3 % more bytes.
        picture.save(buffer, "webp", lossless=lossless, quality=50 if lossless else _QUALITY, method=2)
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    with ThreadPoolExecutor(2) as threads:  # PIL releases the interpreter's lock while it encodes
        return list(threads.map(encode, pictures))
