"""`msf-faiss pretrain`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from msf_faiss.config import Config
    from msf_faiss.train.resume import Resume


@click.command(short_help="Train an encoder on images without labels.")
@click.argument("config", required=False)
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
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="auto: continue the run in --out, if it holds one. never: --out must be new. PATH: begin a new run from that "
    "checkpoint, or from the newest of that run.",
)
@click.option(
    "--allow-config-change",
    "allow_changes",
    multiple=True,
    metavar="KEY",
    help="Continue although this setting, or all of this section, differs from the run's. Repeatable.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65_535),
    metavar="PORT",
    help="Serve the run's gauges for Prometheus at this port; 0: at a free one.",
)
@click.option(
    "--metrics-address",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Where to serve them; 0.0.0.0 lets other hosts read them too.",
)
@click.option(
    "--profile",
    type=click.IntRange(1),
    metavar="STEPS",
    help="Tell where the time of so many of the first steps goes, and write a trace of three more for "
    "chrome://tracing or Perfetto; the run then goes on.",
)
@click.option("--dry-run", is_flag=True, help="Print the complete effective config and end.")
def command(
    config: str | None,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: str,
    allow_changes: tuple[str, ...],
    metrics_port: int | None,
    metrics_address: str,
    profile: int | None,
    dry_run: bool,
) -> int:
    """Train an encoder on images without labels.

    CONFIG is a YAML file or the name of a shipped config; without it a run that is continued keeps its own, and a new
    one is "demo", which trains on built-in images in about two minutes.

    Whatever ended a run, the same command continues it. Ctrl-C, SIGTERM and SIGUSR1 end it with a checkpoint after the
    step in progress; a second one ends it at once. Exit codes: 0 done, 2 something to put right, 75 told to stop by a
    signal (start it again), 130 the same by Ctrl-C, 128 + the signal's number after a second signal.
    """
    from msf_faiss.config.load import dump_config
    from msf_faiss.errors import PeerError, UserError

    source: Resume = "auto" if resume == "auto" else "never" if resume == "never" else Path(resume)
    quiet = os.environ.get("RANK", "0") != "0"
    try:
        settings = _settings(config, overrides, out, source)
    except UserError as error:
        if quiet:  # rank 0 tells it
            raise PeerError(str(error)) from error
        raise
    if dry_run:
        click.echo(dump_config(settings), nl=False)
        return 0

    from msf_faiss.distributed.ranks import join_ranks
    from msf_faiss.run.events import Event, RunEnded
    from msf_faiss.run.recorder import Recorder
    from msf_faiss.train.trainer import pretrain

    from .console import TrainingDisplay, stderr
    from .signals import EndedAtOnce, Stopping

    if out is None and "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("torchrun starts a run anew where it failed: name its directory with --out")
    run_dir = out or Path("runs") / f"{Path(config or 'demo').stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    ended: RunEnded | None = None
    stopping = Stopping(quiet=quiet)
    try:
        with stopping.listening(), join_ranks(settings.train.device) as ranks, contextlib.ExitStack() as told:
            consumers: list[Callable[[Event], None]] = []
            if ranks.is_main:
                consumers = [told.enter_context(Recorder(run_dir)), told.enter_context(TrainingDisplay(stderr()))]
                if metrics_port is not None:
                    from .prometheus import MetricsServer

                    server = told.enter_context(MetricsServer(metrics_port, metrics_address))
                    click.echo(f"metrics  http://{metrics_address}:{server.port}/metrics", err=True)
                    consumers.append(server)
            reports = pretrain(
                settings,
                run_dir,
                resume=source,
                allow_changes=allow_changes,
                should_stop=stopping,
                ranks=ranks,
                profile=profile,
            )
            for report in reports:
                for consume in consumers:
                    consume(report)
                if isinstance(report, RunEnded):
                    ended = report
    except EndedAtOnce as at_once:
        sys.stderr.flush()
        os._exit(at_once.code)  # a checkpoint that is being written is left alone: the next start removes it
    assert ended is not None, "a run's last report is RunEnded"
    if ranks.is_main:
        click.echo(run_dir)
    code = 0 if ended.reason == "finished" else stopping.code
    if ranks.size > 1:
        # All is written and closed; what torch takes down when Python ends has aborted a rank (once, torch 2.14).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _settings(config: str | None, overrides: tuple[str, ...], out: Path | None, resume: Resume) -> Config:
    """The config that is named, or that of the run to continue, with overrides."""
    from msf_faiss.config.load import load_config, override_config

    if config is None and resume != "never" and out is not None:
        from msf_faiss.checkpoint.format import list_checkpoints

        if list_checkpoints(out) and (out / "config.yaml").is_file():
            return load_config(out / "config.yaml", overrides)
    if config is None and isinstance(resume, Path):
        from msf_faiss.checkpoint.format import find_checkpoint

        return override_config(find_checkpoint(resume).config, overrides)
    return load_config(config, overrides)
