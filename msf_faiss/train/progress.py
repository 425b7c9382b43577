"""Builds the events that describe a run and its progress."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from msf_faiss.config import Config
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.evaluate.images import is_labelled
from msf_faiss.run.events import CollapseDetected, RunStarted, TimeEstimated, TrainingProgress
from msf_faiss.train.clock import Clock
from msf_faiss.train.monitors import Monitors, measure_spread
from msf_faiss.train.optimizer import Schedule
from msf_faiss.train.profiler import Profiler
from msf_faiss.train.state import TrainState

_SPREAD_OVER = 256  # newest embeddings
_SIZED = 16  # images whose size is looked at


class Progress:
    """Reports the progress of a run since the last report. All ranks call `report` together."""

    def __init__(
        self, state: TrainState, schedule: Schedule, monitors: Monitors, clock: Clock, profiler: Profiler | None
    ) -> None:
        self._state, self._schedule, self._monitors = state, schedule, monitors
        self._clock, self._profiler = clock, profiler
        self._first_step = self._reported = state.step
        self._images = self._last_images = 0  # over all ranks, since the last report and in the last step
        self._began = self._warm = time.perf_counter()  # since when training runs, and since the first step

    @property
    def seconds(self) -> float:
        """Seconds since training began."""
        return time.perf_counter() - self._began

    def count(self, images: int) -> None:
        """Count the images of a step, over all ranks."""
        self._images += images
        self._last_images = images

    def estimate(self) -> TimeEstimated | None:
        """The time of the run, after the second step of this process."""
        step = self._state.step
        if step - self._first_step <= 2:
            self._clock.settle()
        if step - self._first_step == 1:
            self._warm = time.perf_counter()
        if step - self._first_step != 2:
            return None
        seconds = time.perf_counter() - self._warm
        left = self._schedule.total_steps - step
        return TimeEstimated(step=step, images_per_second=self._last_images / seconds, eta_seconds=left * seconds)

    def report(self) -> Iterator[TrainingProgress | CollapseDetected]:
        """The progress, and a collapse in the report that detects it.

        Raises:
            UserError: if a loss is not finite.
        """
        step, state, ranks, monitors = self._state.step, self._state, self._state.ranks, self._monitors
        seconds, parts = self._clock.read()  # first, since the rest counts as reporting of the next period
        with ranks.report_on_main():
            loss = monitors.loss.mean(step)
        neighbors = monitors.neighbors.summarize()
        if self._profiler is not None:
            self._profiler.add(step, seconds, parts)
        data_seconds = sum(parts.get(part, 0.0) for part in ("data", "views"))
        bank_seconds = sum(parts.get(part, 0.0) for part in ("push", "search", "recall"))
        steps, self._reported = step - self._reported, step
        images, self._images = self._images, 0
        everyone = ranks.gather_objects((state.bank.metrics(), set(monitors.unreadable)))
        newest = state.bank.reconstruct(state.bank.newest(max(1, _SPREAD_OVER // ranks.size)))
        spread = measure_spread(ranks.gather_rows(newest))
        collapsed, epoch = monitors.collapse.update(spread, step), self._schedule.epoch(step)
        yield TrainingProgress(
            step=step,
            epoch=epoch,
            loss=loss,
            purity=neighbors.purity,
            learning_rate=state.optimizer.param_groups[0]["lr"],
            ema_momentum=self._schedule.ema_momentum(step - 1),
            bank_fill_ratio=len(state.bank) / state.bank.capacity,
            neighbor_age_mean=neighbors.age_mean,
            neighbor_age_p95=neighbors.age_p95,
            hubness=neighbors.hubness,
            recall_at_k=monitors.recall.recall if monitors.recall else None,
            embedding_std=spread.std,
            effective_rank=spread.effective_rank,
            collapsing_since=monitors.collapse.since,
            push_ms=1000 * parts.get("push", 0.0) / steps,
            search_ms=1000 * parts.get("search", 0.0) / steps,
            bank_metrics=_means([metrics for metrics, _ in everyone]),
            images_per_second=images / seconds,
            data_time_ratio=data_seconds / seconds,
            bank_time_ratio=bank_seconds / seconds,
            model_time_ratio=max(0.0, 1 - (data_seconds + bank_seconds) / seconds),
            eta_seconds=self.seconds / (step - self._first_step) * (self._schedule.total_steps - step),
            unreadable_images=len(set().union(*(ids for _, ids in everyone))),
        )
        if collapsed and monitors.collapse.since is not None:
            std, rank = spread
            yield CollapseDetected(
                step=step, epoch=epoch, since=monitors.collapse.since, embedding_std=std, effective_rank=rank
            )


def note_small_images(source: Source, size: int) -> Iterator[str]:
    """A note if views of `size` pixels are twice as large as the images, or larger: they cost time and show no more."""
    sides: list[int] = []

    def see(height: int, width: int) -> int:
        sides.append(min(height, width))
        return 8

    for index in np.unique(np.linspace(0, len(source) - 1, _SIZED).astype(np.int64)).tolist():
        known = len(sides)
        with contextlib.suppress(UnreadableImageError):
            image = source.decode(index, see)
            if len(sides) == known:
                sides.append(min(image.shape[1:]))
    side = int(np.median(sides)) if sides else size
    if 2 * side <= size:
        yield (
            f"the images are about {side} px, but the views {size} px: views.size={side} shows as much and is about "
            f"{round((size / side) ** 2)} times as fast (with model.backbone.stem=cifar for a torchvision network)"
        )


def note_missing_labels(config: Config, train: Source, test: Source | None) -> Iterator[str]:
    """A note if kNN evaluations lack the labels of one set."""
    if config.knn.every_epochs is None or test is None or is_labelled(train) == is_labelled(test):
        return
    if is_labelled(train):
        yield "the held-out images have no labels, so kNN evaluations classify the training images by each other"
    else:
        yield "the training images have no labels, so there are no kNN evaluations of the held-out images"


def run_started(
    run_dir: Path,
    source: Source,
    state: TrainState,
    schedule: Schedule,
    *,
    labelled: bool,
    notes: tuple[str, ...],
    evaluates_untrained: bool,
) -> RunStarted:
    """The first event of a run."""
    model, bank = state.model, state.bank
    device = str(state.device)
    if state.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(state.device)})"
    else:
        threads = torch.get_num_threads()
        device += f" ({threads} thread{'s' if threads > 1 else ''})"
    return RunStarted(
        run_dir=run_dir,
        device=device + (f", on each of {state.ranks.size} ranks" if state.ranks.size > 1 else ""),
        images=len(source),
        classes=len(source.classes) if labelled and source.classes is not None else None,
        parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        feature_dim=model.online.feature_dim,
        embedding_dim=model.online.dim,
        bank=repr(bank),
        engine_ms=bank.engine_ms,
        notes=notes,
        steps_per_epoch=schedule.steps_per_epoch,
        total_steps=schedule.total_steps,
        first_step=state.step,
        evaluates_untrained=evaluates_untrained,
    )


def _means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the ranks that have it."""
    names = dict.fromkeys(name for each in metrics for name in each)
    values = {name: [each[name] for each in metrics if name in each] for name in names}
    return {name: sum(each) / len(each) for name, each in values.items()}
