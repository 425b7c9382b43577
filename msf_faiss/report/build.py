"""The report: a self-contained HTML page about one or more runs. Without JavaScript it loses only its crosshair."""

import base64
import datetime
import importlib.resources
import io
import math
import os
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

import msf_faiss
from msf_faiss.config.yaml_subset import dump
from msf_faiss.errors import UserError
from msf_faiss.evaluate.results import Result
from msf_faiss.files import kind_of
from msf_faiss.neighbors.page_html import csp_hash, html_environment
from msf_faiss.neighbors.records import Inspection, write_output
from msf_faiss.report import charts
from msf_faiss.report.charts import Chart, Scale, chart_data, format_value, last_step, step_ticks
from msf_faiss.report.metrics import SMOOTHING_WINDOW, Curve, thin
from msf_faiss.report.run_record import RunRecord, format_time, read_runs
from msf_faiss.report.tables import config_sections, differ, differences, score_tables
from msf_faiss.run.directory import CONFIG, REPORT
from msf_faiss.run.status import Status

_GENERATOR = '<meta name="generator" content="msf-faiss report'
_GENERATOR_WITHIN = 4096  # bytes from the start of a report
_TILE = 56  # approximate side of a picture in CSS pixels
_JPEG_QUALITY = 85
_COLORS = 8  # of runs; report.css defines as many colours and dash patterns
_HEADLINES: dict[str, tuple[str, Callable[[NDArray[np.float64]], Any]]] = {  # statistic shown below the last value
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
    """Write a report of one or several runs and return its path.

    Args:
        runs: run directories, in training or not.
        out: path of the page; None: report.html in the directory of a single run, or in the working directory.
        title: of the page; None: the name of the run, or the number of runs.
        neighbors: show the neighbours of a few queries, which takes some seconds per run.

    Raises:
        UserError: if one of `runs` is not a run, or `out` is not a report or cannot be written.
    """
    if out is None:
        out = runs[0] / REPORT if len({os.path.realpath(run) for run in runs}) == 1 else Path(REPORT)
    _check_overwrites_only_report(out)
    records = read_runs(runs, neighbors=neighbors)
    write_output(out, render_report(records, out=out, title=title))
    return out


def _check_overwrites_only_report(out: Path) -> None:
    kind = kind_of(out, "name another file with --out")
    if kind == "folder":
        raise UserError(f"--out {out}: is a folder; name a file in it, such as {out / REPORT}")
    if kind == "special":  # reading a pipe would wait for its writer
        raise UserError(f"--out {out}: is not a regular file; name another file")
    try:
        with out.open("rb") as file:
            start = file.read(_GENERATOR_WITHIN)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--out {out}: cannot be read: {error.strerror}; choose another file") from error
    if _GENERATOR.encode() not in start:
        raise UserError(f"--out {out}: exists and is not a report of msf-faiss; choose another file")


def render_report(runs: Sequence[RunRecord], *, out: Path, title: str | None = None) -> str:
    """Return the page's HTML. Its links to other pages of the runs are relative to `out`."""
    environment = html_environment()
    environment.tests["differing"] = differ
    metrics = [run.metrics for run in runs]
    groups, last = charts.make_charts(metrics), last_step(metrics)
    shown = [_run_context(number, run, out, last) for number, run in enumerate(runs)]
    sections = config_sections(runs)
    style, script = _asset("report.css") + _toggles(len(runs)), _asset("report.js")
    page = environment.from_string(_asset("page.html.j2")).render(
        title=title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        several=len(runs) > 1,
        runs=shown,
        headlines=list(dict.fromkeys(title for run in shown for title in run["headlines"])),
        groups=groups,
        plot=charts,
        scales=_scales,
        ticks=step_ticks(last),
        last_step=last,
        smoothing_window=SMOOTHING_WINDOW,
        smoothable=any(series.linear.smooth for found in groups.values() for chart in found for series in chart.series),
        labelled=any(run.inspection is not None and run.inspection.summary.purity is not None for run in runs),
        marks=[(number, mark) for number, run in enumerate(runs) for mark in run.metrics.marks],
        configured=[run for run in shown if run["record"].config is not None],
        differences=differences(sections),
        sections=sections,
        tables=score_tables(runs),
        data=_script_data(runs, groups, last),
        style=Markup(style),
        script=Markup(script),
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
        now=format_time(datetime.datetime.now(datetime.UTC).timestamp()),
        version=msf_faiss.__version__,
    )
    return page.encode(errors="backslashreplace").decode()  # names may not be valid UTF-8


def _run_context(number: int, run: RunRecord, out: Path, last: int) -> dict[str, Any]:
    """Return what the page shows of a run except its curves."""
    steps: dict[str, list[int]] = {}
    for mark in run.metrics.marks:
        steps.setdefault(mark.kind, []).append(mark.step)
    return {
        "number": number,
        "marks": {kind: charts.mark_positions(found, last) for kind, found in steps.items()},
        "record": run,
        "look": f"color-{number % _COLORS} dash-{(number + number // _COLORS) % _COLORS}",
        "state": run.status.state if run.status else "unknown",
        "state_text": _describe_state(run.status) if run.status else f"State unknown: {run.missing['status']}",
        "well": run.status is not None and run.status.well,
        "progress": _progress(run),
        "headlines": _headlines(run),
        "warnings": [f"Step {mark.step:,}: {mark.text}." for mark in run.metrics.marks if mark.kind != "bank"],
        "pages": [(page.name, _relative_url(page, out)) for page in run.pages],
        "pictures": _pictures(run.inspection),
        "protocols": [(_result_title(result), dump(dict(result.protocol))) for result in run.results],
        "config_text": _config_text(run),
    }


def _describe_state(status: Status) -> str:
    """Describe in a sentence how a run is doing or how it ended."""
    beat = status.heartbeat
    if beat is None:
        return "Training has not started yet." if status.alive else "The process ended before its first step."
    last = format_time(beat.time)
    match status.state:
        case "finished":
            return f"Finished {last}, {_duration(beat.time - beat.started)} after its last start."
        case "interrupted":
            return f"Interrupted {last}; run the same command again to resume."
        case "failed":
            return f"Failed {last}: {beat.message or 'no message'}"
        case "dead":
            return f"Dead: the process is gone; last heartbeat {last}. Run the same command again to resume."
        case "starting":
            return "A new process has started and has not completed a step yet."
        case _:
            left = "" if beat.eta_seconds is None else f", about {_duration(beat.eta_seconds)} left"
            return f"Training on {beat.host}; last heartbeat {last}{left}."


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=max(0, round(seconds))))


def _progress(run: RunRecord) -> str:
    beat = run.status.heartbeat if run.status else None
    step = max([beat.step if beat else 0, *(int(curve.steps[-1]) for curve in run.metrics.curves.values())])
    epoch = run.metrics.last("epoch")
    total = f" of {beat.total_steps:,}" if beat else ""
    return f"step {step:,}{total}" + ("" if epoch is None else f" (epoch {epoch:.4g})")


def _headlines(run: RunRecord) -> dict[str, dict[str, str]]:
    """Return the last values of the most important metrics that the run has, by title."""
    headlines = {}
    for name, (word, statistic) in _HEADLINES.items():
        if name in run.metrics.curves:
            info = charts.metric_info(name, [run.metrics])
            value = float(statistic(run.metrics.curves[name].values))
            note = f"{word} {format_value(value, info.format)}"
            if name == "knn_accuracy" and (untrained := run.metrics.last("knn_untrained")) is not None:
                note += f", untrained {format_value(untrained, info.format)}"
            headlines[info.title] = {"value": format_value(run.metrics.last(name), info.format), "note": note}
    return headlines


def _config_text(run: RunRecord) -> str | None:
    """Return the raw config file if this release cannot read it."""
    if run.config is not None:
        return None
    try:
        return (run.path / CONFIG).read_text(encoding="utf-8", errors="replace")[:100_000]
    except OSError:
        return None


def _result_title(result: Result) -> str:
    step = "" if result.step is None else f", step {result.step:,}"
    return f"{result.evaluation}, {result.encoder}{step} · {result.created}, {result.device}, {result.seconds:.1f} s"


def _relative_url(page: Path, out: Path) -> str:
    relative = os.path.relpath(page.resolve(), out.resolve().parent)
    return urllib.parse.quote(os.fsencode(relative.replace(os.sep, "/")), safe="/")  # a name may have any bytes


def _pictures(inspection: Inspection | None) -> dict[str, Any] | None:
    if inspection is None or inspection.thumbnails is None:
        return None
    thumbnails = inspection.thumbnails
    side = thumbnails.shown(_TILE)
    return {
        "side": side,
        "small": thumbnails.small,
        "queries": [_data_uri(image, side) for image in thumbnails.queries],
        "images": {index: _data_uri(image, side) for index, image in thumbnails.images.items()},
    }


def _data_uri(image: Image.Image, side: int) -> str:
    """Embed a picture shown at `side` pixels: small ones as they are, large ones at twice that side."""
    buffer = io.BytesIO()
    kind = "png" if image.width <= side else "jpeg"
    if kind == "jpeg":
        image = image.resize((2 * side, 2 * side), Image.Resampling.LANCZOS)
    image.save(buffer, kind, optimize=kind == "png", quality=_JPEG_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _scales(chart: Chart) -> list[tuple[str, Scale]]:
    return [("linear", chart.linear), *([("log", chart.log)] if chart.log else [])]


def _script_data(runs: Sequence[RunRecord], groups: Mapping[str, Sequence[Chart]], last: int) -> dict[str, Any]:
    """Return the numbers that the script needs. They contain no names."""
    none = Curve(np.empty(0, np.int64), np.empty(0))
    epochs = [thin(run.metrics.curves.get("epoch", none)) for run in runs]
    return {
        "last": last,
        "runs": [
            {
                "steps": curve.steps.tolist(),
                "epochs": [None if math.isnan(epoch) else float(f"{epoch:.4g}") for epoch in curve.values.tolist()],
            }
            for curve in epochs
        ],
        "charts": [chart_data(chart) for members in groups.values() for chart in members],
    }


def _toggles(runs: int) -> str:
    """Return the style that hides a run's curves while its checkbox is cleared."""
    return "".join(f"body:has(#show-{n}:not(:checked)) .run-{n} {{ display: none; }}\n" for n in range(runs))


def _asset(name: str) -> str:
    return importlib.resources.files("msf_faiss.report").joinpath(name).read_text("utf-8")
