"""Variants of benchmarks/step.py: the authors' complete step, ours, and the networks alone.

Each runs in its own process (`main` below). Whenever the process reads a number, it runs that many steps and prints the
seconds of each.

Shapes: B images per step, N entries of the bank, S pixels per side, D dimensions, K neighbours.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from bank_data import Clustered
from input import PilPipeline
from PIL import Image
from torch import Tensor

from msf_faiss.bank import Bank, create_bank
from msf_faiss.config import Config, ParquetData
from msf_faiss.device import select_device
from msf_faiss.models import best_memory_format, build_model
from msf_faiss.run.events import TrainingProgress
from msf_faiss.search.faiss_setup import set_threads
from msf_faiss.train import state as training_state
from msf_faiss.train.trainer import pretrain

_CHUNK = 16_384  # entries per push while filling a bank
_MOMENTUM = 0.99


class Authors:
    """The authors' loop, reimplemented from its description.

    Workers decode each image and apply torchvision's transforms of PIL images. Networks run in float32 in contiguous
    layout, and the EMA creates a new tensor for each weight. A step clones the whole bank, computes the distances of
    targets and of queries to all entries as [B, N] matrices, synchronises with the device and reads two numbers.
    """

    def __init__(self, config: Config, workers: int) -> None:
        self.device = select_device(config.train.device)
        self.model = build_model(config.model, seed=config.seed).to(self.device)
        self.k, capacity = config.bank.k, config.bank.capacity
        assert isinstance(capacity, int)
        self.queue = torch.cat(list(entries(self.model.online.dim, capacity))).to(self.device)  # [N, D]
        self.labels = torch.zeros(capacity, dtype=torch.int64, device=self.device)
        self.place = 0
        rule = config.optimizer
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            trained, lr=rule.learning_rate, momentum=rule.momentum, weight_decay=rule.weight_decay
        )
        images = PilImages(config)
        loader = torch.utils.data.DataLoader(
            images,
            batch_size=config.train.batch_size,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
        )
        self.batches = endless(loader)

    def run(self, steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self._step(*next(self.batches))
            seconds.append(time.perf_counter() - start)
        return seconds

    def _step(self, online_view: Tensor, target_view: Tensor, labels: Tensor) -> tuple[float, float]:
        online_view, target_view, labels = (
            each.to(self.device, non_blocking=True) for each in (online_view, target_view, labels)
        )
        model, count = self.model, len(labels)
        queries = F.normalize(model.predictor(model.online(online_view)), dim=1)  # [B, D]
        with torch.no_grad():
            for target, online in zip(model.target.parameters(), model.online.parameters(), strict=True):
                target.data = target.data * _MOMENTUM + online.data * (1 - _MOMENTUM)
            targets = F.normalize(model.target(target_view), dim=1)  # [B, D]
            rows = (self.place + torch.arange(count, device=self.device)) % len(self.queue)
            self.queue[rows], self.labels[rows] = targets, labels
            self.place = (self.place + count) % len(self.queue)
        bank, bank_labels = self.queue.clone().detach(), self.labels.clone().detach()
        of_targets = 2 - 2 * torch.einsum("bc,kc->bk", targets, bank)  # [B, N]
        of_queries = 2 - 2 * torch.einsum("bc,kc->bk", queries, bank)  # [B, N]
        nearest = of_targets.topk(self.k, dim=1, largest=False).indices  # [B, K]
        loss = (of_queries.gather(1, nearest).sum(dim=1) / self.k).mean()
        matches = bank_labels.expand(count, -1).gather(1, nearest) == labels[:, None]
        purity = (matches.sum(dim=1).float() / self.k).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return loss.item(), purity.item()


class Ours:
    """`msf_faiss.train.trainer.pretrain` with a bank that is full from the start."""

    def __init__(self, config: Config, steps: int) -> None:
        """`steps`: steps between two progress events, which delimit the timed steps."""
        training_state.create_bank = filled_bank  # type: ignore[attr-defined]
        train = config.train.model_copy(update={"log_every": steps})
        self.folder, self.steps = TemporaryDirectory(), steps
        self.events = pretrain(config.model_copy(update={"train": train}), Path(self.folder.name) / "run")
        next(self.events)

    def run(self, steps: int) -> list[float]:
        assert steps == self.steps, "progress is reported after a fixed number of steps"
        start = time.perf_counter()
        while not isinstance(next(self.events), TrainingProgress):
            pass
        return [(time.perf_counter() - start) / steps] * steps


class Ceiling:
    """Forward and backward of the online encoder and forward of the target on random tensors: no data, no bank, no
    optimizer."""

    def __init__(self, config: Config) -> None:
        self.device = select_device(config.train.device)
        model = build_model(config.model, seed=config.seed)
        self.layout = best_memory_format(model, self.device)
        self.model = model.to(self.device, memory_format=self.layout)
        size = config.views.size
        views = torch.randn(2, config.train.batch_size, 3, size, size, device=self.device)
        self.online, self.target = (view.contiguous(memory_format=self.layout) for view in views)
        dtype = getattr(torch, config.train.precision)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype == torch.bfloat16)

    def run(self, steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            with self.autocast:
                targets = self.model.embed_target(self.target)
            with self.autocast:
                queries = self.model(self.online)
            (2 - 2 * (queries * targets).sum(dim=1).mean()).backward()
            self.model.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        return seconds


class PilImages(torch.utils.data.Dataset[tuple[Tensor, Tensor, int]]):
    """Two views of each image, decoded by PIL and transformed by torchvision."""

    def __init__(self, config: Config) -> None:
        assert isinstance(config.data, ParquetData), "the images must be in a Parquet file"
        table = pq.read_table(config.data.path)
        self.encoded, self.labels = table["image"].combine_chunks().field("bytes"), table["label"].to_numpy()
        weak, strong = PilPipeline([], config.views).transforms
        kinds = {"weak": weak, "strong": strong}
        self.online, self.target = kinds[config.views.online], kinds[config.views.target]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image = Image.open(io.BytesIO(self.encoded[index].as_py())).convert("RGB")
        return self.online(image), self.target(image), int(self.labels[index])


def entries(dim: int, count: int) -> Iterator[Tensor]:
    """Yield `count` clustered unit vectors in chunks of up to [16384, D]."""
    source = Clustered(dim, seed=0)
    for start in range(0, count, _CHUNK):
        yield source.draw(min(_CHUNK, count - start))


def filled_bank(*arguments: Any, **named: Any) -> Bank:
    """Create a bank as `create_bank` does, and fill it."""
    bank, done = create_bank(*arguments, **named), 0
    for vectors in entries(bank.dim, bank.capacity):
        ids = torch.arange(done, done + len(vectors), device=bank.device) % named.get("images", bank.capacity)
        bank.push(vectors.to(bank.device), ids)
        done += len(vectors)
    return bank


def endless(loader: torch.utils.data.DataLoader[Any]) -> Iterator[Sequence[Tensor]]:
    while True:
        yield from loader


def main() -> None:
    """Run the variant described by the JSON of the first argument; reads step counts on stdin, prints seconds."""
    settings = json.loads(sys.argv[1])
    config = Config.model_validate(settings["config"])
    if config.train.threads is not None:
        set_threads(config.train.threads)
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        variant = (
            Authors(config, settings["workers"])
            if settings["variant"] == "authors"
            else Ours(config, settings["steps"])
            if settings["variant"] == "ours"
            else Ceiling(config)
        )
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(variant.run(int(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
