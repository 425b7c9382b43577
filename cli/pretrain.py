"""`msf-faiss pretrain`."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click


@click.command(short_help="Train an encoder on images without labels.")
@click.argument("config", default="demo")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one setting, e.g. --set train.epochs=50. Repeatable.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of the run.  [default: runs/CONFIG-DATE-TIME]",
)
@click.option(
    "--resume",
    type=click.Choice(["never", "auto"]),
    default="never",
    show_default=True,
    help="auto: continue the run in --out from its newest checkpoint, if it has one.",
)
@click.option("--dry-run", is_flag=True, help="Print the complete effective config and end.")
def command(config: str, overrides: tuple[str, ...], out: Path | None, resume: str, dry_run: bool) -> int:
    """Train an encoder on images without labels.

    CONFIG is a YAML file or the name of a shipped config; "demo" trains on built-in images in about two minutes.
    Ctrl-C ends the run with a checkpoint; a second Ctrl-C ends it at once.
    """
    from msf_faiss.config_file import dump_config, load_config

    settings = load_config(config, overrides)
    if dry_run:
        click.echo(dump_config(settings), nl=False)
        return 0

    from msf_faiss.reports import RunEnded
    from msf_faiss.run_dir import Recorder
    from msf_faiss.train import pretrain

    from .console import TrainingDisplay, stderr

    run_dir = out or Path("runs") / f"{Path(config).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    ended: RunEnded | None = None
    with _stop_flag() as stopped, Recorder(run_dir) as record, TrainingDisplay(stderr()) as display:
        for report in pretrain(settings, run_dir, resume=resume == "auto", should_stop=stopped):
            record(report)
            display(report)
            if isinstance(report, RunEnded):
                ended = report
    assert ended is not None, "a run's last report is RunEnded"
    click.echo(run_dir)
    return 0 if ended.reason == "finished" else 130


class _Stop:
    """Whether Ctrl-C was pressed; the second time it interrupts at once."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        click.echo("stopping after this step, with a checkpoint; Ctrl-C again to stop at once", err=True)


@contextmanager
def _stop_flag() -> Iterator[_Stop]:
    stop = _Stop()
    before = signal.signal(signal.SIGINT, stop.on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
