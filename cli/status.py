"""`msf-faiss status`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from msf_faiss.run.status import Heartbeat, Status

_NOT_WELL = 3  # exit code


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Follow the run until it ends. Ctrl-C ends this command, not the run.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Refresh interval of --watch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per refresh.")
def command(run: Path, watch: bool, every: float, as_json: bool) -> int:
    """Show the status of a run from another terminal.

    RUN is the run directory. Exit codes, for health checks: 0 if the run is training or finished; 3 if it is
    interrupted, failed, or dead (its process ended without recording why); 2 if there is no run.
    """
    from rich.live import Live
    from rich.text import Text

    from .console import stdout

    console = stdout()
    if not watch or as_json or not console.is_terminal:
        return _show_status(run, every if watch else None, as_json, lambda text: console.print(text, markup=False))
    with Live(console=console, auto_refresh=False) as live:
        return _show_status(run, every, as_json, lambda text: live.update(Text(text), refresh=True))


def _show_status(run: Path, every: float | None, as_json: bool, show: Callable[[str], None]) -> int:
    """Show the status once, or every `every` seconds until the run ends; returns the exit code."""
    from msf_faiss.run.status import read_status

    while True:
        status = read_status(run)
        show(json.dumps({**asdict(status), "well": status.well}) if as_json else _as_text(run, status))
        if every is None or not status.alive:
            return 0 if status.well else _NOT_WELL
        try:
            time.sleep(every)
        except KeyboardInterrupt:
            return 0


def _as_text(run: Path, status: Status) -> str:
    rows = {"run": str(run), "state": _state(status)}
    if status.heartbeat is not None:
        rows |= _progress(status.heartbeat)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def _state(status: Status) -> str:
    beat = status.heartbeat
    match status.state:
        case "dead":
            return "dead: the process ended without recording why; start the same command again to resume"
        case "failed":
            return f"failed: {beat.message if beat else ''}"
        case "interrupted":
            return "interrupted; start the same command again to resume"
        case "training" if beat is not None and status.silent_seconds is not None:
            return f"training in process {beat.pid} on {beat.host}, last update {_ago(status.silent_seconds)}"
        case state:
            return state


def _progress(beat: Heartbeat) -> dict[str, str]:
    from .console import duration

    rows = {"step": f"{beat.step:,} of {beat.total_steps:,}"}
    if beat.epoch is not None:
        rows["step"] += f" (epoch {beat.epoch:.4g})"
    if beat.images_per_second is not None and beat.eta_seconds is not None:
        rows["throughput"] = f"{beat.images_per_second:,.0f} img/s"
        rows["ETA"] = duration(beat.eta_seconds)
    if beat.loss is not None:
        rows["loss"] = f"{beat.loss:.4f}" + (f", purity {beat.purity:.3f}" if beat.purity is not None else "")
    if beat.knn_accuracy is not None:
        rows["kNN"] = f"{beat.knn_k}-NN accuracy {beat.knn_accuracy:.1%}"
        if beat.knn_untrained is not None:
            rows["kNN"] += f", untrained {beat.knn_untrained:.1%}"
        if beat.knn_best is not None:
            rows["kNN"] += f", best {beat.knn_best:.1%} at step {beat.knn_best_step:,}"
    if beat.checkpoint is not None:
        rows["checkpoint"] = beat.checkpoint
        if beat.checkpoint_time is not None:
            rows["checkpoint"] += f" ({_ago(time.time() - beat.checkpoint_time)})"
    if beat.collapsing_since is not None:
        rows["warning"] = f"the embeddings have been collapsing since step {beat.collapsing_since:,}"
    elif beat.knn_accuracy is not None and beat.knn_untrained is not None and beat.knn_accuracy < beat.knn_untrained:
        rows["warning"] = f"the {beat.knn_k}-NN accuracy is below that of the untrained network"
    return rows


def _ago(seconds: float) -> str:
    from .console import duration

    return f"{duration(seconds)} ago"
