"""Output to the terminal: consoles for stdout and stderr, and the display of a training run."""

from __future__ import annotations

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
    TimeEstimated,
    TrainingProgress,
)


def stdout() -> Console:
    """For the results of a command: tables and paths. Plain, and never truncated, when piped."""
    return _console(stderr=False)


def stderr() -> Console:
    """For everything else: progress, notices, warnings."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160
    return console


class TrainingDisplay:
    """Shows a run: a live display in a terminal, plain lines elsewhere. Call it with each event, in order."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("steps"), console=console)
        self._task = self._bar.add_task("", total=None)
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._started: RunStarted | None = None

    def __enter__(self) -> TrainingDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._start(event)
            case CachingImages(memory=0):
                self._say("cache    none: images this large are downscaled while decoding; caching would be slower")
            case CachingImages():
                self._say(f"cache    decoding {event.images:,} images into {event.memory / 1e6:,.0f} MB of memory")
            case TimeEstimated():
                speed = f"{event.images_per_second:,.3g} img/s, from one step"
                self._say(f"time     about {duration(event.eta_seconds)} ({speed})")
            case TrainingProgress():
                self._progress(event)
            case KnnEvaluated():
                self._evaluated(event)
            case CheckpointSaved():
                self._say(f"epoch {event.epoch:.4g}: saved checkpoint {event.path}")
            case BankAdjusted():
                self._say(f"step {event.step:,}: bank: {event.text}")
            case CollapseDetected():
                self._say(
                    f"warning: step {event.step:,}: the embeddings have been collapsing since step {event.since:,} "
                    f"(std {event.embedding_std:.2g}, effective rank {event.effective_rank:.3g}). Lower "
                    "optimizer.learning_rate or raise target.momentum, and resume from an earlier checkpoint"
                )
            case StepProfiled():
                self._say(f"profile of {event.steps} steps; trace of three later steps: {event.trace}")
                self._console.print(_profile(event))
            case RunEnded():
                done = f"step {event.step:,} (epoch {event.epoch:.4g})"
                self._say(f"{event.reason} after {done} in {duration(event.seconds)}")

    def _start(self, event: RunStarted) -> None:
        self._started = event
        self._bar.update(self._task, total=event.total_steps, completed=event.first_step)
        labels = f"{event.classes} classes, used for monitoring only" if event.classes else "unlabelled"
        model = f"{event.parameters / 1e6:.2f} M parameters, {event.feature_dim} features"
        self._say(f"run      {event.run_dir}")
        self._say(f"data     {event.images:,} images ({labels}), {event.steps_per_epoch:,} steps per epoch")
        self._say(f"model    {model}, {event.embedding_dim}-dimensional embeddings")
        self._say(f"bank     {event.bank}")
        if event.engine_ms:
            times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in event.engine_ms.items())
            self._say(f"engine   {next(iter(event.engine_ms))}, the fastest on this machine ({times} per search)")
        self._say(f"device   {event.device}")
        if event.evaluates_untrained:
            self._say("kNN      evaluating the untrained network first, for comparison")
        if event.first_step:
            self._say(f"resumed  after step {event.first_step:,} of {event.total_steps:,}")
        for note in event.notes:
            self._say(f"note     {note}")

    def _evaluated(self, event: KnnEvaluated) -> None:
        suffix = ", leave-one-out" if event.leave_one_out else ""
        if event.step == 0:
            suffix += ", untrained"
        elif event.untrained is not None:
            suffix += f" (untrained {event.untrained:.1%})"
        self._say(f"epoch {event.epoch:.4g}: {event.k}-NN accuracy {event.accuracy:.1%}{suffix}")
        if event.warning is not None:
            self._say(f"warning: step {event.step:,}: {event.warning}")

    def _progress(self, event: TrainingProgress) -> None:
        assert self._started is not None, "the first event is RunStarted"
        total, epochs = self._started.total_steps, self._started.total_steps / self._started.steps_per_epoch
        purity = "" if event.purity is None else f" · purity {event.purity:.3f}"
        skipped = f" · {event.unreadable_images:,} unreadable images skipped" if event.unreadable_images else ""
        recall = "" if event.recall_at_k is None else f" · recall@k {event.recall_at_k:.3f}"
        more = "".join(f" · {name.replace('_', ' ')} {value:.3g}" for name, value in event.bank_metrics.items())
        lines = [
            f"epoch {event.epoch:.2f}/{epochs:.4g} · loss {event.loss:.4f}{purity} · "
            f"{event.images_per_second:,.0f} img/s · ETA {duration(event.eta_seconds)}{skipped}",
            f"time: data {event.data_time_ratio:.0%}, bank {event.bank_time_ratio:.0%}, "
            f"model {event.model_time_ratio:.0%} · embedding std {event.embedding_std:.2f}, "
            f"effective rank {event.effective_rank:.0f}",
            f"bank {event.bank_fill_ratio:.0%} full · push {event.push_ms:.3g} ms, search {event.search_ms:.3g} ms"
            f"{recall} · age {event.neighbor_age_mean:,.0f} (p95 {event.neighbor_age_p95:,.0f}) · "
            f"hubness {event.hubness:.1%}{more}",
        ]
        if self._live is None:
            self._say(" · ".join([f"step {event.step:,}/{total:,}", *lines]))
        else:
            self._bar.update(self._task, completed=event.step)
            self._live.update(Group(self._bar, *(Text(line) for line in lines)))

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)


_PARTS = {
    "data": "data wait",
    "views": "augmentation",
    "target": "target forward",
    "push": "push",
    "search": "search",
    "online": "online forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "recall": "recall check",
    "reporting": "reporting",
}


def _profile(event: StepProfiled) -> Table:
    """The time of each part of a step, in the order of the step."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("part of a step")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    parts = {text: event.parts[name] for name, text in _PARTS.items() if name in event.parts}
    rest = event.seconds - sum(parts.values())
    if event.overlapped:  # push and search did not add to the time of the step
        rest += event.parts["push"] + event.parts["search"]
    for text, seconds in [*parts.items(), ("everything else", max(0.0, rest))]:
        note = " (overlaps the online forward)" if event.overlapped and text in ("push", "search") else ""
        table.add_row(text + note, f"{1000 * seconds:.4g}", f"{seconds / event.seconds:.1%}")
    table.add_section()
    table.add_row("step", f"{1000 * event.seconds:.4g}", f"{event.images / event.seconds:,.0f} img/s")
    return table


def duration(seconds: float) -> str:
    """Format as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"
