"""Mean-shift pretraining: the state of a run, one step of it, and the run as a stream of reports.

Shapes: B batch, S height and width of a view, D dimensions of an embedding, K neighbours.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msf_faiss import monitor
from msf_faiss import run_dir as run_directory
from msf_faiss.bank import ApproximateBank, Bank, FlatBank, Neighbors, create_bank
from msf_faiss.bank.faiss_setup import set_threads
from msf_faiss.bank.watch import RecallWatch
from msf_faiss.checkpoint import Checkpoint, Tensors, find_checkpoint, prune_checkpoints, save_checkpoint
from msf_faiss.config import Config, IvfBankConfig, OptimizerConfig, ScanBankConfig
from msf_faiss.data.base import Source
from msf_faiss.data.batches import Batch, steps_per_epoch, training_batches
from msf_faiss.data.sources import open_source
from msf_faiss.errors import UserError
from msf_faiss.evaluate.knn import evaluate_knn
from msf_faiss.loss import mean_shift_loss
from msf_faiss.models import MeanShift, build_model, memory_format
from msf_faiss.reports import BankImproved, CheckpointSaved, Evaluated, Report, RunEnded, RunStarted, StepReport
from msf_faiss.schedule import learning_rate, target_momentum


@dataclass(slots=True)
class TrainState:
    """All that changes while training. Data order and views are functions of the seed and the step."""

    model: MeanShift
    optimizer: torch.optim.SGD
    bank: Bank
    step: int = 0  # finished steps

    @classmethod
    def create(cls, config: Config, device: torch.device, *, images: int | None = None) -> TrainState:
        """The state before the first step; `images` is the size of the data set, for a bank of that size.

        Raises:
            UserError: if the bank does not fit into memory, or not on `device`.
        """
        model = build_model(config.model, seed=config.seed)
        model = model.to(device, memory_format=memory_format(model, device))  # type: ignore[call-overload]
        try:
            bank = create_bank(
                config.bank, dim=model.online.dim, device=device, images=images, batch=config.train.batch_size
            )
        except ValueError as error:
            raise UserError(f"bank: {error}") from error
        return cls(model, create_optimizer(model, config.optimizer), bank)

    def tensors(self) -> dict[str, Tensors]:
        """What a checkpoint holds: for each of its files, tensors by name."""
        momenta = {
            name: self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.model.named_parameters()
            if self.optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
        }
        rng = {"cpu": torch.get_rng_state()}
        if self.bank.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.bank.device)
        return {"model": self.model.state_dict(), "optimizer": momenta, "bank": self.bank.state_dict(), "rng": rng}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same config.

        Raises:
            UserError: if it is damaged or its contents do not fit.
        """
        parameters = dict(self.model.named_parameters())
        rng = checkpoint.tensors("rng")
        try:
            self.model.load_state_dict(checkpoint.tensors("model"), strict=True)
            for name, momentum in checkpoint.tensors("optimizer").items():
                self.optimizer.state[parameters[name]]["momentum_buffer"] = momentum.to(self.bank.device)
            self.bank.load_state_dict(checkpoint.tensors("bank"))
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.bank.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.bank.device)
        except (KeyError, RuntimeError, ValueError) as error:
            complaint = " ".join(str(error).split())
            raise UserError(f"{checkpoint.path}: the checkpoint does not fit its config: {complaint}") from error
        self.step = checkpoint.step


def create_optimizer(model: MeanShift, config: OptimizerConfig) -> torch.optim.SGD:
    """SGD over the online encoder and the predictor; the learning rate is set at each step."""
    trained = [*model.online.parameters(), *model.predictor.parameters()]
    return torch.optim.SGD(trained, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)


def train_step(
    state: TrainState,
    online_view: Tensor,
    target_view: Tensor,
    ids: Tensor,
    *,
    k: int,
    learning_rate: float,
    momentum: float,
    precision: torch.dtype = torch.float32,
    clock: monitor.Clock | None = None,
) -> tuple[Tensor, Neighbors]:
    """One step of mean shift (paper, section 3, algorithm 1; the order is that of the authors' code).

    Args:
        state: changed in place; its step count rises by one.
        online_view: T2(x), [B, 3, S, S].
        target_view: T1(x), [B, 3, S, S].
        ids: [B] int64, data-set indices of the images.
        k: neighbours of each target embedding, itself included.
        learning_rate: of this step.
        momentum: of the target's moving average.
        precision: bfloat16 runs the forwards under autocast; any other dtype runs them as the model is.
        clock: times push and search.

    Returns:
        The loss, a scalar on the device, and the neighbours that it pulled to. The device is not waited for.
    """
    autocast = torch.autocast(ids.device.type, precision, enabled=precision == torch.bfloat16)
    with autocast:
        queries = state.model(online_view)  # [B, D]
    state.model.update_target(momentum)
    with autocast:
        targets = state.model.embed_target(target_view)  # [B, D]
    with clock.on_device("push") if clock else contextlib.nullcontext():
        state.bank.push(targets, ids)
    with clock.on_device("search") if clock else contextlib.nullcontext():
        found = state.bank.search(targets, k)  # [B, K]
        means = state.bank.mean_of(found.slots)  # [B, D]
    loss = mean_shift_loss(queries, means)
    loss.backward()  # type: ignore[no-untyped-call]
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return loss.detach(), found


def pretrain(
    config: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Train as `config` says, in `run_dir`, and tell what happens.

    Args:
        config: the run's config.
        run_dir: a new or empty directory, or with `resume` one that holds a run.
        resume: continue from the newest checkpoint in `run_dir`, if there is one.
        should_stop: asked after each step; true ends the run with a checkpoint.

    Yields:
        `RunStarted`, then step reports, evaluations and checkpoints as they come, then `RunEnded`.

    Raises:
        UserError: data, run directory, checkpoint or device are not usable, the disk is full, or the loss is not
            finite. Checkpoints that exist stay as they are.
    """
    run = _Run(config, run_dir, should_stop)
    with run_directory.claimed(run_dir, config, resume=resume) as continued:
        if continued:
            run.resume()
        yield from run.reports()


def select_device(name: str) -> torch.device:
    """The device that a config's `train.device` or a command's `--device` means: auto, cpu or cuda.

    Raises:
        UserError: if CUDA is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch finds no CUDA device here; use cpu or auto")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


class _Run:
    """A run in progress: what `pretrain` would otherwise pass around."""

    def __init__(self, config: Config, run_dir: Path, should_stop: Callable[[], bool]) -> None:
        self.config, self.run_dir, self.should_stop = config, run_dir, should_stop
        self.device = select_device(config.train.device)
        if config.train.threads is not None:
            set_threads(config.train.threads)
        self.source = _training_source(config)
        self.test_source = open_source(config.data, "test")
        self.labelled = self.source.labels is not None and bool((self.source.labels >= 0).any())
        self.steps_per_epoch = steps_per_epoch(self.source, config)
        self.schedule_steps = config.train.epochs * self.steps_per_epoch
        self.last_step = min(self.schedule_steps, config.train.max_steps or self.schedule_steps)
        self.state = TrainState.create(config, self.device, images=len(self.source))
        self.memory_format = memory_format(self.state.model, self.device)
        self.checkpoint: Path | None = None
        self.neighbors = monitor.NeighborMonitor(self.source.labels if self.labelled else None, self.device)
        self.losses = monitor.LossMonitor()
        self.watch = _watch(config)
        self.notes: tuple[str, ...] = ()
        self.images = 0
        self.reported = 0  # steps finished at the last report
        self.unreadable: set[int] = set()

    @property
    def epoch(self) -> float:
        return self.state.step / self.steps_per_epoch

    def reports(self) -> Iterator[Report]:
        self.first_step = self.state.step
        self.reported = self.first_step
        self.began = time.perf_counter()
        self.clock = monitor.Clock(self.device)
        yield self._started()
        interrupted = False
        with contextlib.closing(training_batches(self.source, self.config, start_step=self.state.step)) as batches:
            while self.state.step < self.last_step and not interrupted:
                improvement = self._step(batches)
                interrupted = self.should_stop()
                evaluating = self.labelled and self._due(self.config.knn.every_epochs)
                saving = self._due(self.config.checkpoint.every_epochs)
                # Nothing is evaluated or saved before the losses that led to it are known to be finite.
                reporting = evaluating or saving or improvement is not None
                if reporting or self.state.step % self.config.train.log_every == 0:
                    yield self._progress()
                if improvement is not None:
                    yield BankImproved(step=self.state.step, epoch=self.epoch, text=improvement)
                if evaluating:
                    yield self._evaluate()
                if saving or interrupted:
                    yield self._save()
        assert self.checkpoint is not None, "the last step saves, and a run that had none to do was resumed from one"
        yield RunEnded(
            step=self.state.step,
            epoch=self.epoch,
            reason="interrupted" if interrupted else "finished",
            checkpoint=self.checkpoint,
            seconds=time.perf_counter() - self.began,
        )

    def _step(self, batches: Iterator[Batch]) -> str | None:
        """Do one step; in words, what the bank did about a recall below what was promised."""
        with self.clock.on_host("data"):
            batch = next(batches).to(self.device)
        with self.clock.on_device("data"):
            online_view, target_view = batch.views(self.config.views)
        step, config = self.state.step, self.config
        loss, found = train_step(
            self.state,
            online_view.contiguous(memory_format=self.memory_format),
            target_view.contiguous(memory_format=self.memory_format),
            batch.ids,
            k=config.bank.k,
            learning_rate=learning_rate(
                step,
                config=config.optimizer,
                steps_per_epoch=self.steps_per_epoch,
                total_steps=self.schedule_steps,
            ),
            momentum=target_momentum(step, config=config.target, total_steps=self.schedule_steps),
            precision=getattr(torch, config.train.precision),
            clock=self.clock,
        )
        self.losses.update(loss)
        bank = self.state.bank
        self.neighbors.update(batch.ids, bank.ids(found.slots), bank.age(found.slots), bank.pushed)
        self.images += len(batch.ids)
        self.unreadable |= batch.unreadable.keys()
        if self.watch is None or not isinstance(bank, ApproximateBank):
            return None
        with self.clock.on_host("watch"):
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
            device=_describe(self.device),
            images=len(source),
            classes=len(source.classes) if self.labelled and source.classes is not None else None,
            parameters=sum(parameter.numel() for parameter in trained),
            feature_dim=model.online.feature_dim,
            embedding_dim=model.online.dim,
            bank=repr(self.state.bank),
            engine_ms=self.state.bank.engine_ms if isinstance(self.state.bank, FlatBank) else {},
            notes=self.notes,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.last_step,
            first_step=self.state.step,
        )

    def _progress(self) -> StepReport:
        done, config, bank = self.state.step, self.config, self.state.bank
        loss = self.losses.read(done)
        neighbors = self.neighbors.read()
        seconds, parts = self.clock.read()
        data, bank_seconds = parts.get("data", 0.0), sum(parts.get(part, 0.0) for part in ("push", "search", "watch"))
        images, self.images = self.images, 0
        steps, self.reported = done - self.reported, done
        return StepReport(
            step=done,
            epoch=self.epoch,
            loss=loss,
            purity=neighbors.purity,
            learning_rate=self.state.optimizer.param_groups[0]["lr"],
            target_momentum=target_momentum(done - 1, config=config.target, total_steps=self.schedule_steps),
            bank_fill=len(bank) / bank.capacity,
            neighbor_age=neighbors.age,
            neighbor_age_p95=neighbors.age_p95,
            hubness=neighbors.hubness,
            recall=self.watch.recall if self.watch else None,
            push_ms=1000 * parts.get("push", 0.0) / steps,
            search_ms=1000 * parts.get("search", 0.0) / steps,
            bank_readings=bank.readings(),
            images_per_second=images / seconds,
            data_share=data / seconds,
            bank_share=bank_seconds / seconds,
            model_share=max(0.0, 1 - (data + bank_seconds) / seconds),
            seconds_left=(time.perf_counter() - self.began) / (done - self.first_step) * (self.last_step - done),
            unreadable=len(self.unreadable),
        )

    def _evaluate(self) -> Evaluated:
        began = time.perf_counter()
        with self.clock.paused():
            score = evaluate_knn(
                self.state.model.online.backbone,
                self.source,
                self.test_source,
                config=self.config,
                device=self.device,
                k=self.config.knn.k,
                limit=self.config.knn.images,
            )
        return Evaluated(
            step=self.state.step,
            epoch=self.epoch,
            k=self.config.knn.k,
            accuracy=score.accuracy,
            leave_one_out=score.leave_one_out,
            seconds=time.perf_counter() - began,
        )

    def _save(self) -> CheckpointSaved:
        began = time.perf_counter()
        with self.clock.paused():
            self.losses.check(self.state.step)
            self._refuse_broken_weights()
            pending = {
                "losses": self.losses.pending,
                **{f"neighbors.{name}": tensor for name, tensor in self.neighbors.pending.items()},
                **({"watch": self.watch.pending} if self.watch else {}),
            }
            self.checkpoint = save_checkpoint(
                self.run_dir,
                step=self.state.step,
                epoch=self.epoch,
                config=self.config,
                dataset_size=len(self.source),
                tensors={**self.state.tensors(), "monitor": pending},
            )
            rule = self.config.checkpoint
            every = (rule.keep_every_epochs or 0) * self.steps_per_epoch
            prune_checkpoints(self.run_dir, keep_last=rule.keep_last, keep=lambda step: every > 0 and step % every == 0)
        return CheckpointSaved(
            step=self.state.step, epoch=self.epoch, path=self.checkpoint, seconds=time.perf_counter() - began
        )

    def _refuse_broken_weights(self) -> None:
        """A last gradient that is not finite spoils the weights though every loss so far was finite."""
        for name, parameter in self.state.model.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(
                    f"after step {self.state.step} the weights of {name} are not finite: training has diverged; "
                    "lower optimizer.learning_rate, or add optimizer.warmup_epochs"
                )

    def resume(self) -> None:
        """Take over the newest checkpoint of the run directory."""
        checkpoint = find_checkpoint(self.run_dir)
        before, now = (config.model_dump(mode="json") for config in (checkpoint.config, self.config))
        moved = _differences(before.pop("bank"), now.pop("bank"), "bank.")
        changed = _differences(before, now) + [text for text in moved if text.startswith("bank.k:")]
        if changed:
            raise UserError(
                f"{self.run_dir}: its run has another config ({'; '.join(changed)}); "
                "continue it with its own config.yaml, or start a new run with another --out"
            )
        if checkpoint.dataset_size != len(self.source):
            raise UserError(
                f"{self.run_dir}: its run had {checkpoint.dataset_size:,} training images, now there are "
                f"{len(self.source):,}; continue it with the same data, or start a new run with another --out"
            )
        self.state.restore(checkpoint)
        pending = checkpoint.tensors("monitor")
        self.losses.pending = pending["losses"]
        self.neighbors.pending = {
            name.removeprefix("neighbors."): tensor for name, tensor in pending.items() if name.startswith("neighbors.")
        }
        if self.watch and "watch" in pending and not moved:
            self.watch.pending = pending["watch"]
        self.checkpoint = checkpoint.path
        if moved:
            taken = f"it took over the newest {len(self.state.bank):,} entries"
            self.notes = (f"the bank is another one ({'; '.join(moved)}); {taken}",)
            run_directory.write_config(self.run_dir, self.config)


def _training_source(config: Config) -> Source:
    source = open_source(config.data, "train")
    assert source is not None, "every config names training data"
    return source


def _watch(config: Config) -> RecallWatch | None:
    """What checks the bank, if it is of a kind that may miss neighbours."""
    match config.bank:
        case ScanBankConfig() | IvfBankConfig() as bank:
            return RecallWatch(bank.watch.every, bank.watch.queries, bank.min_recall)
        case _:
            return None


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Each key with another value, as text. Keys that only one of two kinds has follow from `kind`."""
    found = []
    for key in [key for key in old if key in new]:
        before, after, name = old[key], new[key], f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{name}.")
        elif before != after:
            found.append(f"{name}: {_as_yaml(before)} there, {_as_yaml(after)} now")
    return found


def _as_yaml(value: object) -> str:
    """A setting as a config file spells it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"
