"""How reports look in a terminal: a live display on stderr, or plain lines where stderr is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from msf_faiss.run.events import (
    BankAdjusted,
    CachingImages,
    CheckpointSaved,
    CollapseDetected,
    Event,
    KnnEvaluated,
    RunEnded,
    RunStarted,
    StepProfiled,
    TrainingProgress,
)


def stdout() -> Console:
    """For what a command was asked for: tables and paths. Plain, and never cut, when piped."""
    return _console(stderr=False)


def stderr() -> Console:
    """For everything else: progress, notices, warnings."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # a pipe has no width to fit into
    return console


class TrainingDisplay:
    """Draws the reports of a run; call it with each, in order. On leaving its context the terminal is clean again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("steps"), console=console)
        self._task = self._bar.add_task("", total=None)
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._epochs = 0.0

    def __enter__(self) -> TrainingDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, report: Event) -> None:
        match report:
            case RunStarted():
                self._start(report)
            case CachingImages(memory=0):
                self._say("cache    none: decoders make images as large as these smaller at once, which is quicker")
            case CachingImages():
                self._say(f"cache    {report.images:,} images are decoded and held, {report.memory / 1e6:,.0f} MB")
            case TrainingProgress() if self._live:
                self._bar.update(self._task, completed=report.step)
                tables = (_table(_values(report, self._epochs)), _table(_bank_values(report)))
                self._live.update(Group(self._bar, *tables))
            case TrainingProgress():
                self._say(_line(report, self._epochs))
            case KnnEvaluated():
                among = ", leave-one-out" if report.leave_one_out else ""
                self._say(f"epoch {report.epoch:.4g}: {report.k}-NN accuracy {report.accuracy:.1%}{among}")
            case CheckpointSaved():
                self._say(f"epoch {report.epoch:.4g}: checkpoint saved: {report.path}")
            case BankAdjusted():
                self._say(f"step {report.step:,}: bank: {report.text}")
            case CollapseDetected():
                self._say(
                    f"warning: step {report.step:,}: the embeddings are collapsing since step {report.since:,} "
                    f"(deviation {report.embedding_std:.2g} of 1, effective rank {report.effective_rank:.3g}): lower "
                    "optimizer.learning_rate or raise target.momentum, and go on from a checkpoint before that"
                )
            case StepProfiled():
                self._say(f"profile of {report.steps} steps; a trace of later ones: {report.trace}")
                self._console.print(_profile(report))
            case RunEnded():
                done = f"step {report.step:,} (epoch {report.epoch:.4g})"
                self._say(f"{report.reason} after {done} in {duration(report.seconds)}")

    def _start(self, report: RunStarted) -> None:
        self._epochs = report.total_steps / report.steps_per_epoch
        self._bar.update(self._task, total=report.total_steps, completed=report.first_step)
        labels = f"{report.classes} classes, watched but not trained on" if report.classes else "unlabelled"
        model = f"{report.parameters / 1e6:.2f} M parameters, {report.feature_dim} features"
        self._say(f"run      {report.run_dir}")
        self._say(f"data     {report.images:,} images ({labels}), {report.steps_per_epoch:,} steps an epoch")
        self._say(f"model    {model}, embeddings of {report.embedding_dim} dimensions")
        self._say(f"bank     {report.bank}")
        if report.engine_ms:
            timed = ", ".join(f"{name} {ms:.3g} ms" for name, ms in report.engine_ms.items())
            self._say(f"engine   {next(iter(report.engine_ms))}, the fastest here ({timed} a search)")
        self._say(f"device   {report.device}")
        if report.first_step:
            self._say(f"resumed  after step {report.first_step:,} of {report.total_steps:,}")
        for note in report.notes:
            self._say(f"note     {note}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)


def _values(report: TrainingProgress, epochs: float) -> dict[str, str]:
    """How training goes, as name and text."""
    values = {
        "epoch": f"{report.epoch:.2f}/{epochs:.4g}",
        "loss": f"{report.loss:.4f}",
        "purity": "–" if report.purity is None else f"{report.purity:.3f}",
        "images/s": f"{report.images_per_second:,.0f}",
        "left": duration(report.eta_seconds),
        "data": f"{report.data_time_ratio:.0%}",
        "bank": f"{report.bank_time_ratio:.0%}",
        "model": f"{report.model_time_ratio:.0%}",
        "spread": f"{report.embedding_std:.2f}",
        "rank": f"{report.effective_rank:.0f}",
    }
    return values | ({"unreadable": f"{report.unreadable_images:,}"} if report.unreadable_images else {})


def _bank_values(report: TrainingProgress) -> dict[str, str]:
    """How the bank does, as name and text."""
    recall = {} if report.recall_at_k is None else {"recall": f"{report.recall_at_k:.3f}"}
    return {
        "full": f"{report.bank_fill_ratio:.0%}",
        "push": f"{report.push_ms:.3g} ms",
        "search": f"{report.search_ms:.3g} ms",
        **recall,
        "age": f"{report.neighbor_age_mean:,.0f}",
        "95 %": f"{report.neighbor_age_p95:,.0f}",
        "hubs": f"{report.hubness:.1%}",
        **{name.replace("_", " "): f"{value:.3g}" for name, value in report.bank_metrics.items()},
    }


_PARTS = {
    "data": "data wait",
    "views": "views",
    "target": "target forward",
    "push": "push",
    "search": "search",
    "online": "online forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "watch": "recall checks",
    "reporting": "reporting",
}


def _profile(report: StepProfiled) -> Table:
    """What each part of a step takes, in the order of the step."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("part of a step")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    parts = {text: report.parts[name] for name, text in _PARTS.items() if name in report.parts}
    rest = report.seconds - sum(parts.values())
    if report.overlapped:  # what the bank did meanwhile is no part of the sum
        rest += report.parts["push"] + report.parts["search"]
    for text, seconds in [*parts.items(), ("everything else", max(0.0, rest))]:
        also = " (beside the online forward)" if report.overlapped and text in ("push", "search") else ""
        table.add_row(text + also, f"{1000 * seconds:.4g}", f"{seconds / report.seconds:.1%}")
    table.add_section()
    table.add_row("step", f"{1000 * report.seconds:.4g}", f"{report.images / report.seconds:,.0f} images/s")
    return table


def _table(values: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row(*(Text(name, style="dim") for name in values))
    table.add_row(*values.values())
    return table


def _line(report: TrainingProgress, epochs: float) -> str:
    values = "  ".join(f"{name} {text}" for name, text in _values(report, epochs).items())
    bank = "  ".join(f"{name} {text}" for name, text in _bank_values(report).items())
    return f"step {report.step:,}  {values}  |  bank: {bank}"


def duration(seconds: float) -> str:
    """As hours, minutes and seconds."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"
