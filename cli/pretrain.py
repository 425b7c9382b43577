"""`msf-faiss pretrain`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from msf_faiss.config import Config
    from msf_faiss.run.events import Event
    from msf_faiss.train.resume import Resume


@click.command()
@click.argument("config", required=False)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a setting, e.g. --set train.epochs=50. Repeatable.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Run directory.  [default: runs/CONFIG-DATE-TIME]",
)
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|PATH",
    help="auto: resume the run in --out, if there is one. never: --out must be new. PATH: start a new run from that "
    "checkpoint, or from the newest checkpoint of that run.",
)
@click.option(
    "--allow-config-change",
    "allow_changes",
    multiple=True,
    metavar="KEY",
    help="Resume although this setting, or any setting of this section, differs from the run's. Repeatable.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65_535),
    metavar="PORT",
    help="Serve metrics for Prometheus at this port; 0 selects a free one.",
)
@click.option(
    "--metrics-address",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to serve metrics at; 0.0.0.0 makes them available to other hosts.",
)
@click.option(
    "--profile",
    type=click.IntRange(1),
    metavar="STEPS",
    help="Number of steps to profile. Prints the time of each part of a step, and writes a trace of three more steps "
    "for chrome://tracing or Perfetto; training continues.",
)
@click.option("--dry-run", is_flag=True, help="Print the complete effective config and exit.")
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
    """Pretrain an encoder on images without labels.

    CONFIG is a YAML file or the name of a shipped config. Without it, a resumed run keeps its own config, and a new run
    uses "demo", which trains on built-in images in about two minutes.

    To resume a run, start the same command again. Ctrl-C, SIGTERM or SIGUSR1 stop the run after the current step, with
    a checkpoint; a second signal stops it at once. Exit codes: 0 finished; 2 user error; 75 stopped by a signal, start
    it again; 130 stopped by Ctrl-C; 128 + n stopped at once by signal n.
    """
    from msf_faiss.config.load import dump_config
    from msf_faiss.errors import PeerError, UserError

    source: Resume = "auto" if resume == "auto" else "never" if resume == "never" else Path(resume)
    quiet = os.environ.get("RANK", "0") != "0"
    try:
        settings = _load_settings(config, overrides, out, source, quiet=quiet)
    except UserError as error:
        if quiet:
            raise PeerError(str(error)) from error
        raise
    if dry_run:
        click.echo(dump_config(settings), nl=False)
        return 0
    if out is None and "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("torchrun restarts a failed run: give its directory with --out, so that it resumes")
    run_dir = out or Path("runs") / f"{Path(config or 'demo').stem}-{time.strftime('%Y%m%d-%H%M%S')}"

    from msf_faiss.distributed.ranks import join_ranks
    from msf_faiss.run.events import RunEnded
    from msf_faiss.train.trainer import pretrain

    from .signals import StoppedAtOnce, StopRequest

    should_stop = StopRequest(quiet=quiet)
    try:
        with should_stop.listening(), join_ranks(settings.train.device) as ranks, contextlib.ExitStack() as stack:
            consumers = _consumers(stack, run_dir, metrics_port, metrics_address) if ranks.is_main else []
            for event in pretrain(
                settings,
                run_dir,
                resume=source,
                allow_changes=allow_changes,
                should_stop=should_stop,
                ranks=ranks,
                profile=profile,
            ):
                for consume in consumers:
                    consume(event)
    except StoppedAtOnce as stop:
        sys.stderr.flush()
        os._exit(stop.code)  # abandons a checkpoint in progress, which the next start removes
    assert isinstance(event, RunEnded), "the last event is RunEnded"
    if ranks.is_main:
        click.echo(run_dir)
    code = 0 if event.reason == "finished" else should_stop.code
    if ranks.size > 1:
        # Everything is written and closed. torch's teardown at interpreter exit has aborted a rank (torch 2.14).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _consumers(
    stack: contextlib.ExitStack, run_dir: Path, port: int | None, address: str
) -> list[Callable[[Event], None]]:
    """What records, shows and serves the events, entered into `stack`."""
    from msf_faiss.run.recorder import Recorder

    from .console import TrainingDisplay, stderr

    consumers: list[Callable[[Event], None]] = [
        stack.enter_context(Recorder(run_dir)),
        stack.enter_context(TrainingDisplay(stderr())),
    ]
    if port is not None:
        from .prometheus import MetricsServer

        consumers.append(server := stack.enter_context(MetricsServer(port, address)))
        click.echo(f"metrics  http://{address}:{server.port}/metrics", err=True)
    return consumers


def _load_settings(
    config: str | None, overrides: tuple[str, ...], out: Path | None, resume: Resume, *, quiet: bool
) -> Config:
    """The config named on the command line, or that of the run to resume, with overrides."""
    from msf_faiss.config.load import load_config, override_config
    from msf_faiss.files import kind_of

    if config is not None or resume == "never":
        return load_config(config, overrides)
    from msf_faiss.checkpoint.format import find_checkpoint

    written = None if out is None or kind_of(out / "config.yaml") != "file" else out / "config.yaml"
    saved = None if out is None else _newest_config(out)
    if saved is None and isinstance(resume, Path):
        saved, written = _newest_config(resume) or find_checkpoint(resume).config, None
    if saved is None:
        return load_config(written, overrides)
    if written is not None and not quiet and not _has_config(written, saved):
        click.echo(f"note     {written} is not the config of the newest checkpoint, which is used; see --set", err=True)
    return override_config(saved, overrides)


def _has_config(path: Path, config: Config) -> bool:
    from msf_faiss.config.load import load_config
    from msf_faiss.errors import UserError

    try:
        return load_config(path) == config
    except UserError:
        return False


def _newest_config(run: Path) -> Config | None:
    """The config of the newest checkpoint of a run that can be read."""
    from msf_faiss.checkpoint.format import find_checkpoint, list_checkpoints
    from msf_faiss.errors import UserError

    for path in reversed(list_checkpoints(run)):
        with contextlib.suppress(UserError):  # `pretrain` reports damage, and resumes from the same checkpoint as here
            return find_checkpoint(path).config
    return None
