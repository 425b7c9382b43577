"""The report of runs: one HTML page that needs nothing else, and without scripts loses only its crosshair."""

from __future__ import annotations

import base64
import datetime
import hashlib
import importlib.resources
import io
import math
import os
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

import msf_faiss
from msf_faiss.config.yaml_subset import dump
from msf_faiss.errors import UserError
from msf_faiss.neighbors.records import Inspection, write_output
from msf_faiss.report import charts
from msf_faiss.report.charts import Chart, chart_data, in_words, span, step_ticks
from msf_faiss.report.metrics import SMOOTH_SHARE, Curve, thin
from msf_faiss.report.record import RunRecord, moment, read_runs
from msf_faiss.report.tables import config_sections, differ, differences, score_tables
from msf_faiss.run.directory import CONFIG, REPORT
from msf_faiss.run.status import Status

_GENERATOR = '<meta name="generator" content="msf-faiss report'
_HEAD = 4096  # bytes, within which the generator is named
_TILE = 56  # side of a neighbour, about, in CSS pixels
_JPEG_QUALITY = 85
_COLORS = 8  # of runs; report.css has as many, and dash patterns
_AT_THE_TOP: dict[str, tuple[str, Callable[[NDArray[np.float64]], Any]]] = {
    "loss": ("lowest", np.nanmin),
    "purity": ("highest", np.nanmax),
    "knn_accuracy": ("highest", np.nanmax),
    "recall_at_k": ("lowest", np.nanmin),
    "effective_rank": ("median", np.nanmedian),
    "images_per_second": ("median", np.nanmedian),
}


def write_report(
    runs: Sequence[Path], out: Path | None = None, *, title: str | None = None, neighbors: bool = True
) -> Path:
    """Write the report of one run, or of several side by side, and return where it is.

    Args:
        runs: directories of runs, in training or not.
        out: the page; None: report.html in the directory of a single run, in the working directory for several.
        title: of the page; None: the names of the runs.
        neighbors: look for those of a few queries in the newest checkpoints, which takes seconds a run.

    Raises:
        UserError: if there is no run at one of `runs`, `out` is something other than a report, or cannot be written.
    """
    if out is None:
        out = runs[0] / REPORT if len({run.resolve() for run in runs}) == 1 else Path(REPORT)
    refuse_other(out)
    records = read_runs(runs, neighbors=neighbors)
    write_output(out, render_report(records, out=out, title=title))
    return out


def refuse_other(out: Path) -> None:
    """Raises: UserError: if there is something at `out` that is no report."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it, as {out / REPORT}")
    try:
        with out.open("rb") as file:
            head = file.read(_HEAD)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--out {out}: cannot be read: {error.strerror}; choose another file") from error
    if _GENERATOR.encode() not in head:
        raise UserError(f"--out {out}: is there already and is no report of msf-faiss; choose another file")


def render_report(runs: Sequence[RunRecord], *, out: Path, title: str | None = None) -> str:
    """The page's HTML; links to the runs' own pages are relative to `out`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["differing"] = differ
    environment.filters |= {"percent": "{:.1%}".format, "count": "{:,.0f}".format, "cosine": "{:.3f}".format}
    metrics = [run.metrics for run in runs]
    groups, last_step = charts.draw(metrics), span(metrics)
    shown = [_run(number, run, out, last_step) for number, run in enumerate(runs)]
    sections = config_sections(runs)
    style, script = _asset("report.css") + _toggles(len(runs)), _asset("report.js")
    page = environment.from_string(_asset("page.html.j2")).render(
        title=title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        several=len(runs) > 1,
        runs=shown,
        top=list(dict.fromkeys(title for run in shown for title in run["readings"])),
        groups=groups,
        plot=charts,
        scales=_both_scales,
        ticks=step_ticks(last_step),
        last_step=last_step,
        smooth_share=SMOOTH_SHARE,
        smoothable=any(series.linear.smooth for found in groups.values() for chart in found for series in chart.series),
        labelled=any(run.inspection is not None and run.inspection.summary.purity is not None for run in runs),
        marks=[(number, mark) for number, run in enumerate(runs) for mark in run.metrics.marks],
        configured=[run for run in shown if run["record"].config is not None],
        differences=differences(sections),
        sections=sections,
        tables=score_tables(runs),
        data=_data(runs, groups, last_step),
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        now=moment(datetime.datetime.now(datetime.UTC).timestamp()),
        version=msf_faiss.__version__,
    )
    return page.encode(errors="backslashreplace").decode()  # names need not be valid UTF-8


def _run(number: int, run: RunRecord, out: Path, last_step: int) -> dict[str, Any]:
    """What the page shows of a run beside its curves."""
    marks = [mark for mark in run.metrics.marks if mark.kind != "bank"]
    steps: dict[str, list[int]] = {}
    for mark in run.metrics.marks:
        steps.setdefault(mark.kind, []).append(mark.step)
    return {
        "number": number,
        "mark_places": {kind: charts.mark_places(found, last_step) for kind, found in steps.items()},
        "record": run,
        "look": f"color-{number % _COLORS} dash-{(number + number // _COLORS) % _COLORS}",
        "state": run.status.state if run.status else "not known",
        "ending": ending(run.status) if run.status else f"Not known how it goes: {run.missing['status']}",
        "well": run.status is not None and run.status.well,
        "progress": _progress(run),
        "readings": _readings(run),
        "warnings": [f"Step {mark.step:,}: {mark.text}." for mark in marks],
        "pages": [(page.name, _link(page, out)) for page in run.pages],
        "pictures": _pictures(run.inspection),
        "protocols": [(_question(result), dump(_plain(result.protocol))) for result in run.results],
        "config_text": _config_text(run),
    }


def ending(status: Status) -> str:
    """How a run goes, or how it ended, in a sentence."""
    beat = status.heartbeat
    if beat is None:
        return "It has not begun to train." if status.alive else "Its process is gone before the first step."
    took = datetime.timedelta(seconds=max(0, round(beat.time - beat.started)))
    match status.state:
        case "finished":
            return f"Finished {moment(beat.time)}, {took} after its last process began."
        case "interrupted":
            return f"Interrupted {moment(beat.time)}; the same command continues it."
        case "failed":
            return f"Failed {moment(beat.time)}: {beat.message or 'it did not say why'}"
        case "dead":
            return f"Dead: its process is gone without a word since {moment(beat.time)}; the same command continues it."
        case "starting":
            return "A new process has begun, and its first step is still to come."
        case _:
            left = None if beat.eta_seconds is None else datetime.timedelta(seconds=round(beat.eta_seconds))
            heard = f"In training on {beat.host}, last heard of {moment(beat.time)}"
            return f"{heard}." if left is None else f"{heard}, about {left} left."


def _progress(run: RunRecord) -> str:
    beat = run.status.heartbeat if run.status else None
    steps = [int(curve.steps[-1]) for curve in run.metrics.curves.values()]
    step = max([*steps, beat.step if beat else 0])
    epoch = run.metrics.last("epoch")
    total = f" of {beat.total_steps:,}" if beat else ""
    return f"step {step:,}{total}" + ("" if epoch is None else f" (epoch {epoch:.4g})")


def _readings(run: RunRecord) -> dict[str, dict[str, str]]:
    """The last readings of what matters most, those that there are, by title."""
    found = {}
    for name, (word, of) in _AT_THE_TOP.items():
        if name in run.metrics.curves:
            measure = charts.measure_of(name, [run.metrics])
            found[measure.title] = {
                "value": in_words(run.metrics.last(name), measure.format),
                "about": f"{word} {in_words(float(of(run.metrics.curves[name].values)), measure.format)}",
            }
    return found


def _config_text(run: RunRecord) -> str | None:
    """The file as it stands, where it is no config of this release."""
    if run.config is not None:
        return None
    try:
        return (run.path / CONFIG).read_text(encoding="utf-8", errors="replace")[:100_000]
    except OSError:
        return None


def _question(result: Any) -> str:
    at = "" if result.step is None else f", step {result.step:,}"
    return f"{result.evaluation}, {result.encoder}{at} · {result.created}, {result.device}, {result.seconds:.1f} s"


def _plain(value: Any) -> Any:
    """Mappings of any kind as dictionaries, which is all that YAML writes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _link(page: Path, out: Path) -> str:
    """From the report to a page beside it, as a URL; a name may hold any bytes."""
    relative = os.path.relpath(page.resolve(), out.resolve().parent)
    return urllib.parse.quote(os.fsencode(relative.replace(os.sep, "/")), safe="/")


def _pictures(inspection: Inspection | None) -> dict[str, Any] | None:
    if inspection is None or inspection.thumbnails is None:
        return None
    thumbnails = inspection.thumbnails
    return {
        "side": thumbnails.shown(_TILE),
        "small": thumbnails.small,
        "queries": [_data_uri(image, thumbnails.shown(_TILE)) for image in thumbnails.queries],
        "images": {index: _data_uri(image, thumbnails.shown(_TILE)) for index, image in thumbnails.images.items()},
    }


def _data_uri(image: Image.Image, side: int) -> str:
    """The picture in the page itself: small ones pixel by pixel, large ones at twice their size on the page."""
    buffer = io.BytesIO()
    if image.width <= side:
        image.save(buffer, "png", optimize=True)
        kind = "png"
    else:
        image.resize((2 * side, 2 * side), Image.Resampling.LANCZOS).save(buffer, "jpeg", quality=_JPEG_QUALITY)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _both_scales(chart: Chart) -> list[tuple[str, charts.Scale]]:
    return [("linear", chart.linear), *([("log", chart.log)] if chart.log else [])]


def _data(runs: Sequence[RunRecord], groups: Mapping[str, Sequence[Chart]], last_step: int) -> dict[str, Any]:
    """Numbers for the script; no name is among them."""
    none = Curve(np.empty(0, np.int64), np.empty(0))
    epochs = [thin(run.metrics.curves.get("epoch", none)) for run in runs]
    return {
        "last": last_step,
        "runs": [
            {
                "steps": curve.steps.tolist(),
                "epochs": [None if math.isnan(epoch) else float(f"{epoch:.4g}") for epoch in curve.values.tolist()],
            }
            for curve in epochs
        ],
        "charts": [chart_data(chart) for charts_of in groups.values() for chart in charts_of],
    }


def _toggles(runs: int) -> str:
    """Style that shows a run's curves while its box in the legend is ticked."""
    return "".join(f"body:has(#show-{n}:not(:checked)) .run-{n} {{ display: none; }}\n" for n in range(runs))


def _asset(name: str) -> str:
    return importlib.resources.files("msf_faiss.report").joinpath(name).read_text("utf-8")


def _csp_hash(text: str) -> str:
    """What a Content-Security-Policy knows an inline style or script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"
