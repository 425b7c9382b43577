"""The training loop."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from msf_faiss.config import Config
from msf_faiss.data.decoded_cache import cache_decoded, cache_size
from msf_faiss.data.sampler import steps_per_epoch
from msf_faiss.data.sources.open import open_source
from msf_faiss.data.train_batches import Batch, training_batches
from msf_faiss.data.workers import warm_up, worker_count
from msf_faiss.device import select_device
from msf_faiss.distributed.ranks import ALONE, Ranks, is_peer_lost
from msf_faiss.errors import PeerError, RestartError, UserError
from msf_faiss.evaluate.knn import evaluate_knn
from msf_faiss.models import best_memory_format
from msf_faiss.run.directory import lock_run
from msf_faiss.run.events import BankAdjusted, CachingImages, Event, KnnEvaluated, RunEnded, StepProfiled
from msf_faiss.run.status import LOCK
from msf_faiss.search.arguments import VectorError
from msf_faiss.search.faiss_setup import set_threads
from msf_faiss.train.checkpointing import Checkpointer
from msf_faiss.train.clock import Clock
from msf_faiss.train.monitors import Monitors, diverged
from msf_faiss.train.optimizer import Schedule
from msf_faiss.train.overlap import SequentialRetriever
from msf_faiss.train.profiler import Profiler
from msf_faiss.train.progress import Progress, note_missing_labels, note_small_images, run_started
from msf_faiss.train.resume import Resume, find_resume_point
from msf_faiss.train.state import TrainState
from msf_faiss.train.step import train_step
from msf_faiss.train.watchdog import Watchdog

_MIN_MICRO_BATCH = 2  # images: fewer have no batch statistics


def pretrain(
    config: Config,
    run_dir: Path,
    *,
    resume: Resume = "auto",
    allow_changes: Sequence[str] = (),
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
    profile: int | None = None,
) -> Iterator[Event]:
    """Run pretraining; yield progress events.

    Args:
        config: of the run.
        run_dir: a new or empty directory, or the directory of the run to resume.
        resume: see `resume.Resume`.
        allow_changes: config keys, or whole sections, that may differ from the run that is resumed.
        should_stop: called between steps; True ends the run with a checkpoint.
        ranks: each rank calls this; only rank 0's events are complete.
        profile: number of steps to profile, see `profiler.Profiler`. None: no profile.

    Yields:
        `RunStarted`; progress, evaluations and checkpoints as they occur; `RunEnded`.

    Raises:
        UserError: if data, run directory, checkpoint or device cannot be used, the disk is full, or the loss is not
            finite. Existing checkpoints stay intact.
        RestartError: if another rank is lost.
    """
    try:
        trainer = _Trainer(config, run_dir, should_stop, ranks)
        with _lock(run_dir, resume, ranks):
            trainer.resume(resume, allow_changes)
            yield from trainer.train(profile)
    except RuntimeError as error:
        if ranks.size > 1 and is_peer_lost(error):
            raise RestartError(
                f"rank {ranks.rank} lost another rank, whose own message says why. "
                "Start the same command again to resume from the last checkpoint"
            ) from error
        raise


@contextlib.contextmanager
def _lock(run_dir: Path, resume: Resume, ranks: Ranks) -> Iterator[None]:
    """Lock the run directory, by rank 0 for all ranks."""
    with contextlib.ExitStack() as stack:
        ranks.on_main(lambda: stack.enter_context(lock_run(run_dir, resume=resume != "never")))
        if not (run_dir / LOCK).is_file():
            raise UserError(
                f"{run_dir}: rank {ranks.rank} does not see the files that rank 0 wrote there. "
                "Put the run directory on a file system that all hosts share"
            )
        yield


class _Agreement(NamedTuple):
    """What all ranks know before a step."""

    batch: Batch  # of this rank
    images: list[int]  # per rank
    stop: bool
    save: bool


class _Trainer:
    """A run in progress."""

    def __init__(self, config: Config, run_dir: Path, should_stop: Callable[[], bool], ranks: Ranks) -> None:
        self.config, self.run_dir, self.should_stop, self.ranks = config, run_dir, should_stop, ranks
        torch.manual_seed(config.seed)  # this code does not use the global generator; other code may
        if config.train.threads is not None:
            set_threads(config.train.threads)
        elif ranks.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            set_threads(max(1, torch.get_num_threads() // ranks.local_size))
        with ranks.main_first():  # rank 0 downloads and unpacks, and reports errors
            self.device = select_device(config.train.device)
            source, self.test_source = open_source(config.data, "train"), open_source(config.data, "test")
            assert source is not None, "every config names training data"
            self.source = source
            steps = steps_per_epoch(len(self.source), config.train.batch_size, ranks=ranks.size)
        self.schedule = Schedule(config, steps)
        if worker_count(self.source, config, self.device, processes=ranks.local_size):
            warm_up()
        self.state = TrainState.create(config, self.device, images=len(self.source), ranks=ranks)
        self.memory_format = best_memory_format(self.state.model, self.device)
        self.monitors = Monitors(config, self.source, self.state.bank.device, ranks)
        self.checkpointer = Checkpointer(run_dir, self.state, self.monitors, self.schedule, self.source)
        self.watchdog = Watchdog(config.train.hang_seconds)
        self.notes: tuple[str, ...] = ()

    def resume(self, resume: Resume, allow_changes: Sequence[str]) -> None:
        point = find_resume_point(self.run_dir, resume, self.ranks)
        if point is not None:
            self.notes = self.checkpointer.resume_from(point, allow_changes)
        self.checkpointer.write_config_of_new_run()

    def train(self, profile: int | None) -> Iterator[Event]:
        clock, total_steps = Clock(self.device), self.schedule.total_steps
        self.clock, self.profiler = clock, None
        if profile is not None:
            self.profiler = Profiler(profile, first_step=self.state.step, last_step=total_steps, clock=clock)
        if self.ranks.is_main:
            self.notes += (*note_small_images(self.source, self.config.views.size),)
        labelled = self.monitors.labelled
        untrained = labelled and self.config.knn.every_epochs is not None and self.state.step == 0 < total_steps
        yield run_started(
            self.run_dir,
            self.source,
            self.state,
            self.schedule,
            labelled=labelled,
            notes=(*self.notes, *note_missing_labels(self.config, self.source, self.test_source)),
            evaluates_untrained=untrained,
        )
        yield from self._cache_images()
        if untrained:
            yield self._evaluate()
        self.progress = Progress(self.state, self.schedule, self.monitors, clock, self.profiler)
        stopped = False
        batches = training_batches(
            self.source,
            self.config,
            device=self.device,
            start_step=self.state.step,
            ranks=self.ranks,
            unreadable=self.monitors.unreadable,
        )
        with contextlib.closing(batches), self.checkpointer.saving(), self.watchdog.watching():
            while self.state.step < total_steps:
                agreed = self._agree(batches)
                if isinstance(agreed, Exception):
                    yield from self._save_intact()
                    raise agreed
                batch, images, stopped, save = agreed
                if save:
                    self._save()
                if stopped:
                    break
                with self.ranks.known_row_counts(images):
                    adjustment = self._step(batch, images)
                yield from self._after_step(adjustment)
            self._save()
            with self.watchdog.paused():
                self.checkpointer.wait()
            yield from self.checkpointer.saved()
        assert self.checkpointer.latest is not None, "the last step is saved"
        yield RunEnded(
            step=self.state.step,
            epoch=self.schedule.epoch(self.state.step),
            reason="interrupted" if stopped else "finished",
            checkpoint=self.checkpointer.latest,
            seconds=self.progress.seconds,
        )

    def _cache_images(self) -> Iterator[CachingImages]:
        if self.state.step >= self.schedule.total_steps:
            return
        processes = self.ranks.local_size
        with self.clock.paused(), self.ranks.report_on_main():
            memory = self.ranks.broadcast_object(cache_size(self.source, self.config, processes=processes))
            if memory is None:
                return
            yield CachingImages(images=len(self.source), memory=memory)
            if memory:
                self.source = cache_decoded(self.source, self.config, processes=processes)

    def _agree(self, batches: Iterator[Batch]) -> _Agreement | Exception:
        """Get the next batch, and agree on what to do: the only exchange of a step that the host waits for.

        Returns the error because of which this rank has no batch, or a `PeerError` if another rank has none.
        """
        batch: Batch | Exception
        with self.clock.on_host("data"):
            try:
                batch = next(batches)
            except Exception as error:
                batch = error
        # A stop on any rank stops all; the clock of rank 0 decides when to save.
        save = self.ranks.is_main and self.checkpointer.is_overdue
        images = 0 if isinstance(batch, Exception) else len(batch.ids)
        row = [images, isinstance(batch, Exception), self.should_stop(), save]
        with self.ranks.known_row_counts([1] * self.ranks.size):
            rows = self.ranks.gather_rows(torch.tensor([row]))  # [W, 4]
        if isinstance(batch, Exception):
            return batch
        if rows[:, 1].any():
            return PeerError(f"rank {int(rows[:, 1].argmax())} failed and reports why")
        return _Agreement(batch, rows[:, 0].tolist(), stop=bool(rows[:, 2].any()), save=bool(rows[:, 3].any()))

    def _step(self, batch: Batch, images: list[int]) -> str | None:
        """Take one step; returns the bank's adjustment if its recall was too low."""
        step, config, bank = self.state.step, self.config, self.state.bank
        ids = batch.ids.to(bank.device, non_blocking=True)
        with self.clock.on_device("views"):
            online_view, target_view = batch.to(self.device).views(config.views)
        try:
            loss, neighbors = train_step(
                self.state,
                online_view.contiguous(memory_format=self.memory_format),
                target_view.contiguous(memory_format=self.memory_format),
                ids,
                k=config.bank.k,
                learning_rate=self.schedule.learning_rate(step),
                momentum=self.schedule.ema_momentum(step),
                precision=getattr(torch, config.train.precision),
                temperature=config.train.temperature,
                loss_weight=len(ids) / sum(images),
                micro_batches=max(1, min(config.train.accumulate, min(images) // _MIN_MICRO_BATCH)),
                clock=self.clock,
            )
        except VectorError as error:
            self.monitors.loss.check(step)  # an earlier loss says when it began
            raise diverged(f"the target embeddings of step {step + 1} are not finite") from error
        self.watchdog.reset()
        with self.clock.on_host("reporting"):
            self.monitors.loss.update(loss)
            self.monitors.neighbors.update(ids, bank.ids(neighbors.slots), bank.age(neighbors.slots), bank.pushed)
        self.progress.count(sum(images))
        if self.monitors.recall is None:
            return None
        with self.clock.on_host("recall"), self.ranks.known_row_counts(None):
            return self.monitors.recall.check(bank, neighbors, self.state.step)

    def _after_step(self, adjustment: str | None) -> Iterator[Event]:
        """Report, evaluate and save what is due after the step."""
        step, epoch, config = self.state.step, self.schedule.epoch(self.state.step), self.config
        evaluate = self.monitors.labelled and self.schedule.is_due(step, config.knn.every_epochs)
        save = self.schedule.is_due(step, config.checkpoint.every_epochs)
        profile = self.profiler is not None and self.profiler.is_due(step)
        estimate = self.progress.estimate()
        if estimate is not None and config.train.log_every > 2:  # else a report is about to say it
            yield estimate
        # A report checks the losses, so it precedes an evaluation or a save.
        if evaluate or save or profile or adjustment is not None or step % config.train.log_every == 0:
            self.clock.settle()
            with self.clock.on_host("reporting"):
                yield from self.progress.report()
        if self.profiler is not None and self.profiler.trace(step):
            yield self._profiled(self.profiler)
        if adjustment is not None:
            yield BankAdjusted(step=step, epoch=epoch, text=adjustment)
        if evaluate:
            try:
                evaluated = self._evaluate()
            except UserError:
                yield from self._save_intact()
                raise
            yield evaluated
        if save:
            self._save()
        yield from self.checkpointer.saved()

    def _save_intact(self) -> Iterator[Event]:
        """Save the state before an error of the data ends the run. All ranks call this together, between two steps.

        Without a step there is nothing to lose, and data that are repaired may be other data.
        """
        if self.state.step:
            with contextlib.suppress(UserError):  # the first error is the one to report
                self._save()
                with self.watchdog.paused():
                    self.checkpointer.wait()
                yield from self.checkpointer.saved()

    def _save(self) -> None:
        with self.clock.paused(), self.watchdog.paused():
            self.checkpointer.save()

    def _profiled(self, profiler: Profiler) -> StepProfiled:
        with self.clock.paused():
            return StepProfiled(
                step=self.state.step,
                epoch=self.schedule.epoch(self.state.step),
                steps=profiler.steps,
                seconds=profiler.seconds,
                parts=profiler.parts,
                overlapped=not isinstance(self.state.retrieve, SequentialRetriever),
                images=float(self.config.train.batch_size),
                trace=self.ranks.on_main(lambda: profiler.write_trace(self.run_dir)),
            )

    def _evaluate(self) -> KnnEvaluated:
        began = time.perf_counter()
        with self.clock.paused(), self.watchdog.paused():
            score = self.ranks.on_main(
                lambda: evaluate_knn(
                    self.state.model.online.backbone,
                    self.source,
                    self.test_source,
                    config=self.config,
                    device=self.device,
                    k=self.config.knn.k,
                    limit=self.config.knn.images,
                ),
            )
        monitor, step = self.monitors.knn, self.state.step
        warning = monitor.update(step, score.accuracy, score.images)
        best = monitor.best()
        return KnnEvaluated(
            step=step,
            epoch=self.schedule.epoch(step),
            k=self.config.knn.k,
            accuracy=score.accuracy,
            leave_one_out=score.leave_one_out,
            seconds=time.perf_counter() - began,
            images=score.images,
            untrained=monitor.untrained,
            best=None if best is None else monitor.accuracies[best],
            best_step=best,
            warning=warning,
        )
