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


@click.command(short_help="See how a run goes, from another terminal.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Follow it until it ends; Ctrl-C stops looking, not the run.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Pause between two looks.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, an object a look.")
def command(run: Path, watch: bool, every: float, as_json: bool) -> int:
    """See how the run in the directory RUN goes, from another terminal.

    Exit codes: 0 it trains, or has finished; 3 it does not train and is not finished (interrupted, failed, or dead: the
    process is gone without a word); 2 there is no run. So it serves as a health check.
    """
    from rich.live import Live
    from rich.text import Text

    from .console import stdout

    console = stdout()
    if not watch or as_json or not console.is_terminal:
        return _look(run, every if watch else None, as_json, lambda text: console.print(text, markup=False))
    with Live(console=console, auto_refresh=False) as live:
        return _look(run, every, as_json, lambda text: live.update(Text(text), refresh=True))


def _look(run: Path, every: float | None, as_json: bool, show: Callable[[str], None]) -> int:
    """Show a run's status, once or every so many seconds until it ends; the exit code."""
    from msf_faiss.run.status import read_status

    while True:
        status = read_status(run)
        show(json.dumps({**asdict(status), "well": status.well}) if as_json else _words(run, status))
        if every is None or not status.alive:
            return 0 if status.well else _NOT_WELL
        try:
            time.sleep(every)
        except KeyboardInterrupt:
            return 0


def _words(run: Path, status: Status) -> str:
    facts = {"run": str(run), "state": _state(status)}
    if status.heartbeat is not None:
        facts |= _progress(status.heartbeat)
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


def _state(status: Status) -> str:
    beat = status.heartbeat
    match status.state:
        case "dead":
            return "dead: its process is gone without a word; the same command continues it"
        case "failed":
            return f"failed: {beat.message if beat else ''}"
        case "interrupted":
            return "interrupted; the same command continues it"
        case "training" if beat is not None and status.silent_seconds is not None:
            return f"training, process {beat.pid} on {beat.host}; last heard of {_ago(status.silent_seconds)}"
        case state:
            return state


def _progress(beat: Heartbeat) -> dict[str, str]:
    from .console import duration

    facts = {"step": f"{beat.step:,} of {beat.total_steps:,}"}
    if beat.epoch is not None:
        facts["step"] += f" (epoch {beat.epoch:.4g})"
    if beat.images_per_second is not None and beat.eta_seconds is not None:
        facts["rate"] = f"{beat.images_per_second:,.0f} images/s"
        facts["left"] = duration(beat.eta_seconds)
    if beat.loss is not None:
        facts["loss"] = f"{beat.loss:.4f}" + (f", purity {beat.purity:.3f}" if beat.purity is not None else "")
    if beat.checkpoint is not None:
        facts["checkpoint"] = beat.checkpoint
        if beat.checkpoint_time is not None:
            facts["checkpoint"] += f" ({_ago(time.time() - beat.checkpoint_time)})"
    if beat.collapsing_since is not None:
        facts["warning"] = f"the embeddings are collapsing since step {beat.collapsing_since:,}"
    return facts


def _ago(seconds: float) -> str:
    from .console import duration

    return f"{duration(seconds)} ago"
