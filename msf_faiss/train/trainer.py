"""A run of mean-shift pretraining as a stream of reports."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from msf_faiss.bank import ApproximateBank, Bank, FlatBank, ParallelBank
from msf_faiss.bank.recall_monitor import RecallMonitor
from msf_faiss.checkpoint.format import Tensors
from msf_faiss.checkpoint.save import prune_checkpoints, quarantine, save_checkpoint
from msf_faiss.config import Config, IvfBankConfig, ScanBankConfig
from msf_faiss.data.decoded_cache import cache_decoded, cache_size
from msf_faiss.data.sampler import steps_per_epoch
from msf_faiss.data.source import Source
from msf_faiss.data.sources.open import open_source
from msf_faiss.data.train_batches import Batch, training_batches
from msf_faiss.data.workers import warm_up, worker_count
from msf_faiss.device import select_device
from msf_faiss.distributed.ranks import Ranks, is_peer_lost
from msf_faiss.errors import PeerError, RestartError, UserError
from msf_faiss.evaluate.knn import evaluate_knn
from msf_faiss.models import best_memory_format
from msf_faiss.run import directory as run_directory
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
from msf_faiss.search.faiss_setup import set_threads
from msf_faiss.train import monitors as monitor
from msf_faiss.train.background_saver import BackgroundSaver
from msf_faiss.train.clock import Clock
from msf_faiss.train.optimizer import ema_momentum, learning_rate
from msf_faiss.train.overlap import InTurn
from msf_faiss.train.profiler import Profiler
from msf_faiss.train.resume import Beginning, Resume, allowed_changes, find_beginning
from msf_faiss.train.state import TrainState
from msf_faiss.train.step import train_step
from msf_faiss.train.watchdog import Watchdog

_LEAST_PART = 2  # images of a part of a batch, which have batch statistics
_SPREAD = 256  # newest embeddings whose spread a report tells


def pretrain(
    config: Config,
    run_dir: Path,
    *,
    resume: Resume = "auto",
    allow_changes: Sequence[str] = (),
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks | None = None,
    profile: int | None = None,
) -> Iterator[Event]:
    """Train as `config` says, in `run_dir`, and tell what happens.

    Args:
        config: the run's config.
        run_dir: a new or empty directory, or one that holds the run to continue.
        resume: see `resume.Resume`.
        allow_changes: config keys, or whole sections, that may differ from the run that is continued.
        should_stop: asked between two steps; true ends the run with a checkpoint.
        ranks: that train together, each calling this; None: this process alone. Only rank 0's reports are complete.
        profile: steps of which to tell where their time goes; see `profiling.Profiler`. None: none.

    Yields:
        `RunStarted`, then step reports, evaluations and checkpoints as they come, then `RunEnded`.

    Raises:
        UserError: data, run directory, checkpoint or device are not usable, the disk is full, or the loss is not
            finite. Checkpoints that exist stay as they are.
        RestartError: another rank is gone.
    """
    ranks = ranks or Ranks.alone()
    try:
        run = _Run(config, run_dir, should_stop, ranks, profile)
        with _claimed(run_dir, config, resume, ranks):
            beginning = find_beginning(run_dir, resume, ranks)
            if beginning is not None:
                run.go_on_from(beginning, allow_changes)
            yield from run.reports()
    except RuntimeError as error:
        if ranks.size > 1 and is_peer_lost(error):
            raise RestartError(
                f"rank {ranks.rank} lost another rank, whose own message says why; "
                "start the same command again to continue from the last checkpoint"
            ) from error
        raise


@contextlib.contextmanager
def _claimed(run_dir: Path, config: Config, resume: Resume, ranks: Ranks) -> Iterator[None]:
    """Hold the run directory: rank 0 for all of them."""
    with contextlib.ExitStack() as held:
        claim = run_directory.claimed(run_dir, config, resume=resume != "never")
        ranks.on_main(lambda: held.enter_context(claim))
        if not (run_dir / run_directory.CONFIG).is_file():
            raise UserError(
                f"{run_dir}: rank {ranks.rank} does not see what rank 0 wrote there; "
                "the run directory must be on a file system that all hosts share"
            )
        yield


class _Run:
    """A run in progress: what `pretrain` would otherwise pass around."""

    def __init__(
        self, config: Config, run_dir: Path, should_stop: Callable[[], bool], ranks: Ranks, profile: int | None
    ) -> None:
        self.config, self.run_dir, self.should_stop, self.ranks = config, run_dir, should_stop, ranks
        self.profile = profile
        torch.manual_seed(config.seed)  # nothing of ours draws from it, but torch may begin with any other state
        if config.train.threads is not None:
            set_threads(config.train.threads)
        elif ranks.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            set_threads(max(1, torch.get_num_threads() // ranks.local_size))
        with ranks.main_first():  # the first downloads and unpacks, and tells what is wrong
            self.device = select_device(config.train.device)
            self.source = _training_source(config)
            self.test_source = open_source(config.data, "test")
            self.steps_per_epoch = steps_per_epoch(len(self.source), config.train.batch_size, ranks=ranks.size)
        if worker_count(self.source, config, self.device, processes=ranks.local_size):
            warm_up()
        self.labelled = self.source.labels is not None and bool((self.source.labels >= 0).any())
        self.schedule_steps = config.train.epochs * self.steps_per_epoch
        self.last_step = min(self.schedule_steps, config.train.max_steps or self.schedule_steps)
        self.state = TrainState.create(config, self.device, images=len(self.source), ranks=ranks)
        self.memory_format = best_memory_format(self.state.model, self.device)
        labels = self.source.labels if self.labelled else None
        self.neighbors = monitor.NeighborMonitor(labels, self.state.bank.device, ranks.sum)
        self.losses = monitor.LossMonitor(ranks.sum)
        self.watch = _watch(config, ranks)
        self.collapse, self.collapsed = monitor.CollapseWatch(), False  # the latter: as of the last report
        self.notes: tuple[str, ...] = ()
        self.unreadable: dict[int, str] = {}  # by id, what is wrong with images that this rank left out
        self.origin: str | None = None
        self.checkpoint: Path | None = None
        self.saved_step: int | None = None
        self.saver = BackgroundSaver(self._write, background=config.checkpoint.background)
        self.save_ranks = ranks.side_channel()
        self.watchdog = Watchdog(config.train.hang_seconds)
        self.images = 0  # since the last report, on all ranks

    @property
    def epoch(self) -> float:
        return self.state.step / self.steps_per_epoch

    def reports(self) -> Iterator[Event]:
        self.first_step = self.reported = self.state.step
        self.clock = Clock(self.device)
        self.profiler = None
        if self.profile is not None:
            self.profiler = Profiler(
                self.profile, first_step=self.state.step, last_step=self.last_step, clock=self.clock
            )
        yield self._started()
        yield from self._hold_images()
        self.began = self.saved_at = time.perf_counter()
        interrupted = False
        batches = training_batches(
            self.source,
            self.config,
            device=self.device,
            start_step=self.state.step,
            ranks=self.ranks,
            unreadable=self.unreadable,
        )
        with contextlib.closing(batches), self.saver.finishing(), self.watchdog.watching():
            while self.state.step < self.last_step:
                with self.clock.on_host("data"):
                    batch = _next(batches)
                counts, interrupted, overdue = self._agree(batch)
                if overdue and self.saved_step != self.state.step:
                    self._save()
                if interrupted:
                    break
                assert isinstance(batch, Batch), "a mistake ends the run"
                with self.ranks.known_row_counts(counts):
                    improvement = self._step(batch, counts)
                evaluating = self.labelled and self._due(self.config.knn.every_epochs)
                saving = self._due(self.config.checkpoint.every_epochs)
                # Nothing is evaluated or saved before the losses that led to it are known to be finite.
                reporting = evaluating or saving or improvement is not None
                if self.profiler is not None:
                    reporting |= self.profiler.is_due(self.state.step)
                if reporting or self.state.step % self.config.train.log_every == 0:
                    self.clock.settle()
                    with self.clock.on_host("reporting"):
                        progress = self._progress()
                        yield progress
                    if self.collapsed:
                        yield _collapsing(progress)
                if self.profiler is not None and self.profiler.trace(self.state.step):
                    yield self._profiled(self.profiler)
                if improvement is not None:
                    yield BankAdjusted(step=self.state.step, epoch=self.epoch, text=improvement)
                if evaluating:
                    yield self._evaluate()
                if saving:
                    self._save()
                yield from self._saved()
            if self.saved_step != self.state.step:
                self._save()
            with self.watchdog.paused():
                self.saver.wait()
            yield from self._saved()
        assert self.checkpoint is not None, "the last step is saved"
        yield RunEnded(
            step=self.state.step,
            epoch=self.epoch,
            reason="interrupted" if interrupted else "finished",
            checkpoint=self.checkpoint,
            seconds=time.perf_counter() - self.began,
        )

    def _hold_images(self) -> Iterator[CachingImages]:
        if self.state.step >= self.last_step:
            return
        processes = self.ranks.local_size
        with self.clock.paused(), self.ranks.report_on_main():
            memory = self.ranks.broadcast_object(cache_size(self.source, self.config, processes=processes))
            if memory is None:
                return
            yield CachingImages(images=len(self.source), memory=memory)
            if memory:
                self.source = cache_decoded(self.source, self.config, processes=processes)

    def _agree(self, batch: Batch | UserError) -> tuple[list[int], bool, bool]:
        """What all ranks must know alike before a step: the images of each, whether to stop, whether to save.

        The one exchange of a step that the host waits for.

        Raises:
            UserError: what there is instead of a batch; a `PeerError` if another rank has none.
        """
        minutes = self.config.checkpoint.every_minutes
        overdue = minutes is not None and time.perf_counter() - self.saved_at >= 60 * minutes
        # Whoever is told to stop stops all; rank 0's clock is everybody's.
        images = 0 if isinstance(batch, UserError) else len(batch.ids)
        told = [images, isinstance(batch, UserError), self.should_stop(), overdue and self.ranks.is_main]
        with self.ranks.known_row_counts([1] * self.ranks.size):
            everyone = self.ranks.gather_rows(torch.tensor([told]))  # [W, 4]
        if isinstance(batch, UserError):
            raise batch
        if everyone[:, 1].any():
            raise PeerError(f"rank {int(everyone[:, 1].argmax())} cannot go on, and says why")
        return everyone[:, 0].tolist(), bool(everyone[:, 2].any()), bool(everyone[:, 3].any())

    def _step(self, batch: Batch, counts: list[int]) -> str | None:
        """Do one step; in words, what the bank did about a recall below what was promised."""
        step, config, bank = self.state.step, self.config, self.state.bank
        ids = batch.ids.to(bank.device, non_blocking=True)
        with self.clock.on_device("views"):
            online_view, target_view = batch.to(self.device).views(config.views)
        loss, found = train_step(
            self.state,
            online_view.contiguous(memory_format=self.memory_format),
            target_view.contiguous(memory_format=self.memory_format),
            ids,
            k=config.bank.k,
            learning_rate=learning_rate(
                step,
                config=config.optimizer,
                batch_size=config.train.batch_size,
                steps_per_epoch=self.steps_per_epoch,
                total_steps=self.schedule_steps,
            ),
            momentum=ema_momentum(step, config=config.target, total_steps=self.schedule_steps),
            precision=getattr(torch, config.train.precision),
            share=len(ids) / sum(counts),
            parts=max(1, min(config.train.accumulate, min(counts) // _LEAST_PART)),
            clock=self.clock,
        )
        self.watchdog.heard()
        with self.clock.on_host("reporting"):
            self.losses.update(loss)
            self.neighbors.update(ids, bank.ids(found.slots), bank.age(found.slots), bank.pushed)
        self.images += sum(counts)
        if self.watch is None or not isinstance(bank, ApproximateBank):
            return None
        with self.clock.on_host("watch"), self.ranks.known_row_counts(None):
            return self.watch.check(bank, found, self.state.step)

    def _due(self, every_epochs: int | None) -> bool:
        """Whether something that happens every so many epochs, and at the end of the run, happens after this step."""
        if every_epochs is None:
            return False
        return self.state.step == self.last_step or self.state.step % (every_epochs * self.steps_per_epoch) == 0

    def _started(self) -> RunStarted:
        model, source = self.state.model, self.source
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return RunStarted(
            run_dir=self.run_dir,
            device=_describe(self.device, self.ranks),
            images=len(source),
            classes=len(source.classes) if self.labelled and source.classes is not None else None,
            parameters=sum(parameter.numel() for parameter in trained),
            feature_dim=model.online.feature_dim,
            embedding_dim=model.online.dim,
            bank=repr(self.state.bank),
            engine_ms=_engine_ms(self.state.bank),
            notes=self.notes,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.last_step,
            first_step=self.state.step,
        )

    def _progress(self) -> TrainingProgress:
        done, config, bank = self.state.step, self.config, self.state.bank
        seconds, parts = self.clock.read()  # before what is itself timed as reporting, in the time to come
        with self.ranks.report_on_main():
            loss = self.losses.read(done)
        neighbors = self.neighbors.read()
        if self.profiler is not None:
            self.profiler.add(done, seconds, parts)
        data, bank_seconds = (
            sum(parts.get(part, 0.0) for part in names) for names in (("data", "views"), ("push", "search", "watch"))
        )
        images, self.images = self.images, 0
        steps, self.reported = done - self.reported, done
        everyone = self.ranks.gather_objects((bank.metrics(), set(self.unreadable)))
        newest = bank.reconstruct(bank.newest(max(1, _SPREAD // self.ranks.size)))
        spread = monitor.spread_of(self.ranks.gather_rows(newest))
        self.collapsed = self.collapse.update(spread, done)
        return TrainingProgress(
            step=done,
            epoch=self.epoch,
            loss=loss,
            purity=neighbors.purity,
            learning_rate=self.state.optimizer.param_groups[0]["lr"],
            ema_momentum=ema_momentum(done - 1, config=config.target, total_steps=self.schedule_steps),
            bank_fill_ratio=len(bank) / bank.capacity,
            neighbor_age_mean=neighbors.age,
            neighbor_age_p95=neighbors.age_p95,
            hubness=neighbors.hubness,
            recall_at_k=self.watch.recall if self.watch else None,
            embedding_std=spread.std,
            effective_rank=spread.rank,
            collapsing_since=self.collapse.since,
            push_ms=1000 * parts.get("push", 0.0) / steps,
            search_ms=1000 * parts.get("search", 0.0) / steps,
            bank_metrics=_means([readings for readings, _ in everyone]),
            images_per_second=images / seconds,
            data_time_ratio=data / seconds,
            bank_time_ratio=bank_seconds / seconds,
            model_time_ratio=max(0.0, 1 - (data + bank_seconds) / seconds),
            eta_seconds=(time.perf_counter() - self.began) / (done - self.first_step) * (self.last_step - done),
            unreadable_images=len(set().union(*(ids for _, ids in everyone))),
        )

    def _profiled(self, profiler: Profiler) -> StepProfiled:
        with self.clock.paused():
            return StepProfiled(
                step=self.state.step,
                epoch=self.epoch,
                steps=profiler.steps,
                seconds=profiler.seconds,
                parts=profiler.parts,
                beside=not isinstance(self.state.retrieve, InTurn),
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
        return KnnEvaluated(
            step=self.state.step,
            epoch=self.epoch,
            k=self.config.knn.k,
            accuracy=score.accuracy,
            leave_one_out=score.leave_one_out,
            seconds=time.perf_counter() - began,
        )

    def _save(self) -> None:
        """Begin to save the state as it is."""
        with self.clock.paused(), self.watchdog.paused():
            with self.ranks.report_on_main():
                self.losses.check(self.state.step)
                self._refuse_broken_weights()
            pending = {
                "losses": self.losses.pending,
                **{f"neighbors.{name}": tensor for name, tensor in self.neighbors.pending.items()},
                **({"watch": self.watch.state_dict()["counts"]} if self.watch else {}),
                "collapse": self.collapse.pending,
                "unreadable": self._unreadable_anywhere(),
            }
            tensors = self.state.tensors()
            if self.ranks.is_main:
                tensors["monitor"] = pending
            self.saver.save(self.state.step, self.epoch, tensors)
        self.saved_step, self.saved_at = self.state.step, time.perf_counter()

    def _write(self, step: int, epoch: float, tensors: Mapping[str, Tensors]) -> Path:
        """Write a checkpoint; in a thread, so nothing that a step changes is used."""
        if self.ranks.is_main:
            run_directory.sync_records(self.run_dir)
        path = save_checkpoint(
            self.run_dir,
            step=step,
            epoch=epoch,
            config=self.config,
            dataset_size=len(self.source),
            origin=self.origin,
            tensors=tensors,
            ranks=self.save_ranks,
        )
        if self.ranks.is_main:
            rule = self.config.checkpoint
            every = (rule.keep_every_epochs or 0) * self.steps_per_epoch
            prune_checkpoints(self.run_dir, keep_last=rule.keep_last, keep=lambda step: every > 0 and step % every == 0)
        return path

    def _saved(self) -> Iterator[CheckpointSaved]:
        for saved in self.saver.saved():
            self.checkpoint = saved.path
            yield saved

    def _refuse_broken_weights(self) -> None:
        """A last gradient that is not finite spoils the weights though every loss so far was finite."""
        for name, parameter in self.state.model.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(
                    f"after step {self.state.step} the weights of {name} are not finite: training has diverged; "
                    "lower optimizer.learning_rate, or add optimizer.warmup_epochs"
                )

    def _unreadable_anywhere(self) -> Tensor:
        """Ids of the images that any rank left out: [n] int64."""
        everyone = self.ranks.gather_objects(set(self.unreadable))
        return torch.tensor(sorted(set().union(*everyone)), dtype=torch.int64)

    def go_on_from(self, beginning: Beginning, allow_changes: Sequence[str]) -> None:
        """Take over a checkpoint; all ranks take part.

        Raises:
            UserError: if its config or its data are others, or its contents do not fit.
        """
        checkpoint = beginning.checkpoint
        owner = checkpoint.run_dir or checkpoint.path
        changes = allowed_changes(owner, checkpoint.config, self.config, allow_changes)
        if checkpoint.dataset_size != len(self.source):
            raise UserError(
                f"{owner}: its run had {checkpoint.dataset_size:,} training images, now there are "
                f"{len(self.source):,}; continue it with the same data, or start a new run with another --out"
            )
        self.state.restore(checkpoint)
        pending = checkpoint.tensors("monitor")
        if not self.ranks.is_main:  # what was counted on all ranks goes on at one
            watch = {name: tensor for name, tensor in pending.items() if name == "watch"}
            pending = {name: torch.zeros_like(tensor) for name, tensor in pending.items()} | watch
        self.losses.pending = pending["losses"]
        self.collapse.pending = checkpoint.tensors("monitor")["collapse"]
        self.neighbors.pending = {
            name.removeprefix("neighbors."): tensor for name, tensor in pending.items() if name.startswith("neighbors.")
        }
        moved = [text for text in changes if text.startswith("bank.")]
        if self.watch and "watch" in pending and not moved:
            self.watch.load_state_dict({"counts": pending["watch"]})
        if self.ranks.is_main:
            self.unreadable = {index: f"image {index}, found earlier" for index in pending["unreadable"].tolist()}
        self.origin = beginning.origin
        if checkpoint.run_dir == self.run_dir:
            self.checkpoint, self.saved_step = checkpoint.path, checkpoint.step
        notes = self._dealt_with(beginning.damaged) + [f"the config is another one: {text}" for text in changes]
        if moved:
            notes.append(f"the bank took over the newest {len(self.state.bank):,} entries")
        if changes and self.ranks.is_main:
            run_directory.write_config(self.run_dir, self.config)
        self.notes = tuple(notes)

    def _dealt_with(self, damaged: Mapping[Path, str]) -> list[str]:
        """In words, what became of damaged checkpoints that are newer than the one that the run goes on from."""
        notes = []
        for path, wrong in damaged.items():
            if path.parent.parent != self.run_dir:  # another run's, to be left alone
                notes.append(wrong)
                continue
            aside = self.ranks.on_main(lambda path=path: quarantine(path))  # type: ignore[misc]
            notes.append(f"{wrong}; it is now {aside.name}, and the run goes on from an older one")
        return notes


def _training_source(config: Config) -> Source:
    source = open_source(config.data, "train")
    assert source is not None, "every config names training data"
    return source


def _watch(config: Config, ranks: Ranks) -> RecallMonitor | None:
    """What checks the bank, if it is of a kind that may miss neighbours."""
    match config.bank:
        case ScanBankConfig() | IvfBankConfig() as bank:
            return RecallMonitor(
                every_steps=bank.recall_check.every_steps,
                queries=bank.recall_check.queries,
                min_recall=bank.min_recall,
                total=ranks.sum,
            )
        case _:
            return None


def _collapsing(progress: TrainingProgress) -> CollapseDetected:
    assert progress.collapsing_since is not None
    return CollapseDetected(
        step=progress.step,
        epoch=progress.epoch,
        since=progress.collapsing_since,
        embedding_std=progress.embedding_std,
        effective_rank=progress.effective_rank,
    )


def _next(batches: Iterator[Batch]) -> Batch | UserError:
    """The next batch, or a mistake of the user's that other ranks must hear of before it ends this one."""
    try:
        return next(batches)
    except UserError as error:
        return error


def _means(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each reading's mean over the ranks that have it."""
    names = dict.fromkeys(name for each in readings for name in each)
    found = {name: [each[name] for each in readings if name in each] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def _engine_ms(bank: Bank) -> Mapping[str, float]:
    """Milliseconds of each engine of an exact bank, if they were timed."""
    bank = bank.local if isinstance(bank, ParallelBank) else bank
    return bank.engine_ms if isinstance(bank, FlatBank) else {}


def _describe(device: torch.device, ranks: Ranks) -> str:
    if device.type == "cuda":
        what = f"{device} ({torch.cuda.get_device_name(device)})"
    else:
        what = f"{device} ({torch.get_num_threads()} threads)"
    return what if ranks.size == 1 else f"{what}, on each of {ranks.size} ranks"
