"""Saves the checkpoints of a run, and resumes the run from one."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msf_faiss.checkpoint.format import Tensors, list_checkpoints, step_of
from msf_faiss.checkpoint.images import FILE as IMAGES
from msf_faiss.checkpoint.images import describe_images, find_changes
from msf_faiss.checkpoint.save import prune_checkpoints, quarantine, save_checkpoint
from msf_faiss.data.source import Source
from msf_faiss.errors import UserError
from msf_faiss.run.directory import sync_metrics, write_config
from msf_faiss.run.events import CheckpointSaved
from msf_faiss.train.background_saver import BackgroundSaver
from msf_faiss.train.monitors import Monitors, diverged
from msf_faiss.train.optimizer import Schedule
from msf_faiss.train.resume import ResumePoint, check_changes, refuse_if_finished
from msf_faiss.train.state import TrainState


class Checkpointer:
    """Saves and restores state and monitors of a run. All ranks call `save` and `resume_from` together.

    Args:
        source: the training images, which must not change within a run.
    """

    def __init__(
        self, run_dir: Path, state: TrainState, monitors: Monitors, schedule: Schedule, source: Source
    ) -> None:
        self.latest: Path | None = None  # path of the newest checkpoint that is complete
        self._run_dir, self._source = run_dir, source
        self._images = describe_images(source) if state.ranks.is_main else {}
        self._state, self._monitors, self._schedule, self._ranks = state, monitors, schedule, state.ranks
        self._config = schedule.config
        self._origin: str | None = None
        self._origin_seal: str | None = None
        self._saver_ranks = state.ranks.side_channel()
        self._saver = BackgroundSaver(self._write, background=self._config.checkpoint.background)
        self._saved_step: int | None = None
        self._saved_at = time.perf_counter()

    @property
    def is_overdue(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed since the last save."""
        minutes = self._config.checkpoint.every_minutes
        return minutes is not None and time.perf_counter() - self._saved_at >= 60 * minutes

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Surrounds training: completes the save in progress on exit, except after KeyboardInterrupt."""
        self._saved_at = time.perf_counter()
        with self._saver.finishing():
            yield

    def save(self) -> None:
        """Start saving the current state, unless this step is saved already.

        Raises:
            UserError: if a loss or a weight is not finite, or the save before this one failed.
        """
        if self._saved_step == self._state.step:
            return
        with self._ranks.report_on_main():
            self._monitors.loss.check(self._state.step)
            self._refuse_non_finite_weights()
        monitors = self._monitors.state_dict()
        tensors = self._state.tensors()
        if self._ranks.is_main:
            tensors |= {"monitor": monitors, IMAGES: self._images}
        self._saver.save(self._state.step, self._schedule.epoch(self._state.step), tensors)
        self._saved_step, self._saved_at = self._state.step, time.perf_counter()

    def wait(self) -> None:
        """Wait for the save in progress; raises its error."""
        self._saver.wait()

    def saved(self) -> Iterator[CheckpointSaved]:
        """Checkpoints completed since the last call. Does not wait; raises the error of a failed save."""
        for saved in self._saver.saved():
            self.latest = saved.path
            yield saved

    def resume_from(self, point: ResumePoint, allow_changes: Sequence[str]) -> tuple[str, ...]:
        """Restore state and monitors from a checkpoint.

        Returns:
            Notes for the user: changed settings, damaged checkpoints.

        Raises:
            UserError: if config or data differ from the checkpoint's, or its contents do not fit.
        """
        checkpoint = point.checkpoint
        owner = checkpoint.run_dir or checkpoint.path
        damaged = [*self._quarantine(point.damaged)]  # first, as the next start then takes the config of the older one
        changes = check_changes(owner, checkpoint.config, self._config, allow_changes)
        data = self._ranks.on_main(lambda: find_changes(checkpoint, self._source))
        if data.images is not None:
            raise UserError(
                f"{owner}: the training images have changed: {data.images}. Resume with the same images, or start a "
                "new run with another --out"
            )
        refuse_if_finished(point, self._run_dir, self._schedule, changes)
        self._state.restore(checkpoint)
        bank_changed = any(change.startswith("bank.") for change in changes)
        knn_changed = data.labels is not None or any(
            change.startswith(("knn.", "data.", "views.")) for change in changes
        )
        self._monitors.load_state_dict(
            checkpoint.tensors("monitor"), bank_changed=bank_changed, knn_changed=knn_changed
        )
        self._origin, self._origin_seal = point.origin, point.origin_seal
        # In a new run too: before its first step, there is nothing of its own to save.
        self.latest, self._saved_step = checkpoint.path, checkpoint.step
        notes = [*damaged, *(f"config changed: {change}" for change in changes)]
        if data.labels is not None:
            notes.append(f"{data.labels}; from now on the new ones count, in metrics only")
        if bank_changed:
            notes.append(f"the bank kept the newest {len(self._state.bank):,} entries")
        return tuple(notes)

    def write_config_of_new_run(self) -> None:
        """Write the config, unless there is a checkpoint: then it changes with the next one."""
        self._ranks.on_main(
            lambda: None if list_checkpoints(self._run_dir) else write_config(self._run_dir, self._config)
        )

    def _write(self, step: int, epoch: float, tensors: Mapping[str, Tensors]) -> Path:
        """Write a checkpoint. Runs in a thread, so it must not use anything that a step changes."""
        if self._ranks.is_main:
            sync_metrics(self._run_dir)
        path = save_checkpoint(
            self._run_dir,
            step=step,
            epoch=epoch,
            config=self._config,
            dataset_size=len(self._source),
            origin=self._origin,
            origin_seal=self._origin_seal,
            tensors=tensors,
            ranks=self._saver_ranks,
        )
        if self._ranks.is_main:
            write_config(self._run_dir, self._config)
            rule = self._config.checkpoint
            every = (rule.keep_every_epochs or 0) * self._schedule.steps_per_epoch
            best = self._monitors.knn.best({step_of(path) for path in list_checkpoints(self._run_dir)})
            prune_checkpoints(
                self._run_dir,
                keep_last=rule.keep_last,
                keep=lambda step: (every > 0 and step % every == 0) or step == best,
            )
        return path

    def _refuse_non_finite_weights(self) -> None:
        """The last gradient can be infinite although every loss so far was finite."""
        for name, parameter in self._state.model.named_parameters():
            if not parameter.isfinite().all():
                raise diverged(f"the weights of {name} are not finite after step {self._state.step}")

    def _quarantine(self, damaged: Mapping[Path, str]) -> Iterator[str]:
        """Rename damaged checkpoints of this run; yields a note for each, and for those of another run."""
        for path, defect in damaged.items():
            if path.parent.parent != self._run_dir:
                yield defect
                continue
            renamed = self._ranks.on_main(lambda path=path: quarantine(path))  # type: ignore[misc]
            yield f"{defect}. Renamed it to {renamed.name}; resuming from an older checkpoint"
