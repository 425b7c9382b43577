"""Accuracy of a backbone that is fine-tuned on few labels: semi-supervised evaluation.

The protocol of SwAV (Caron et al. 2020; the figures are those of `eval_semisup.py` in its code) for ResNet-50 on 1 %
and 10 % of ImageNet: a linear layer on the backbone, both trained for 20 epochs by SGD without weight decay at learning
rates of their own, which fall to a fifth after 12 and 16 epochs; random crops and flips; batch statistics of the whole
batch. SwAV reports the best epoch by the test images, here it is the last one.

Shapes: N training images, B of a batch, b of this rank's part of it, S pixels of a view's side, C classes.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msf_faiss.config import Config, WeakView
from msf_faiss.data.eval_batches import EvalBatch, eval_batches
from msf_faiss.data.sampler import epoch_order
from msf_faiss.data.source import Source
from msf_faiss.distributed.batch_norm import synchronize_batch_norm
from msf_faiss.distributed.ranks import Ranks, data_parallel
from msf_faiss.errors import UserError
from msf_faiss.evaluate.linear import AUGMENTATION, LinearScore
from msf_faiss.models import best_memory_format

_LEAST_FOR_ONE_PERCENT = 5_000  # images
_LEAST = 2  # images that have batch statistics
_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """How to fine-tune; `dataclasses.replace` changes a published setting."""

    backbone_learning_rate: float
    head_learning_rate: float  # of the linear layer, which begins at random
    epochs: int = 20
    batch_size: int = 256  # images a step, of all ranks together
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay: float = 0.2  # what the learning rates are multiplied by after each of the drops
    drops: tuple[float, ...] = (12 / 20, 16 / 20)  # shares of the epochs
    view: WeakView = AUGMENTATION  # crops of 8 to 100 % of the area, and flips

    @property
    def milestones(self) -> list[int]:
        """Epochs after which the learning rates fall: 12 and 16 of 20."""
        return [round(share * self.epochs) for share in self.drops]


ONE_PERCENT = FinetuneSettings(backbone_learning_rate=0.02, head_learning_rate=5.0)
TEN_PERCENT = FinetuneSettings(backbone_learning_rate=0.01, head_learning_rate=0.2)


def settings_for(fraction: float, images: int) -> FinetuneSettings:
    """The published settings for the fraction of the labels nearer to this one, by its logarithm.

    Those for 1 % were found with 12,811 `images`. With few, the layer's rate of 5 drives the net to chance (9 % of
    CIFAR-10 with 500 images, where the rates for 10 % reach 36 %): below 5,000 images it is always the rates for 10 %.
    """
    few_labels = fraction < math.sqrt(0.01 * 0.1)
    return ONE_PERCENT if few_labels and images >= _LEAST_FOR_ONE_PERCENT else TEN_PERCENT


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneEpoch:
    """What one epoch came to."""

    epoch: int  # finished epochs
    epochs: int
    loss: float  # mean over the epoch's training images, each before the step that it was part of
    accuracy: float  # 0..1, of the same, under their random crops


def finetune(
    backbone: nn.Module,
    source: Source,
    ids: Tensor,
    test: Source,
    test_ids: Tensor,
    *,
    config: Config,
    device: torch.device,
    classes: int,
    settings: FinetuneSettings,
    ranks: Ranks | None = None,
    on_epoch: Callable[[FinetuneEpoch], None] = lambda done: None,
) -> LinearScore:
    """Fine-tune a copy of `backbone` with a linear layer on some images, and score it on the centre views of others.

    Args:
        backbone: [B, 3, S, S] -> [B, F]; it is left as it is.
        source: of the training images.
        ids: [N] int64, the training images, all labelled.
        test: of the test images.
        test_ids: [M] int64, which of them, all labelled; a class >= `classes` is never guessed.
        config: its seed determines the layer's first weights, order and crops, its views the size of a crop.
        device: where to compute.
        classes: C, larger than every training label.
        settings: of the training.
        ranks: that train together and share out the test images: all of them return the same score.
        on_epoch: told after each epoch, on every rank.

    Raises:
        UserError: see `finetuned`; if an image is unreadable; if logits of test images are not finite.
    """
    ranks = ranks or Ranks.alone()
    network = finetuned(
        backbone,
        source,
        ids,
        config=config,
        device=device,
        classes=classes,
        settings=settings,
        ranks=ranks,
        on_epoch=on_epoch,
    )
    return _score(network, test, test_ids, classes, config=config, device=device, settings=settings, ranks=ranks)


def finetuned(
    backbone: nn.Module,
    source: Source,
    ids: Tensor,
    *,
    config: Config,
    device: torch.device,
    classes: int,
    settings: FinetuneSettings,
    ranks: Ranks | None = None,
    on_epoch: Callable[[FinetuneEpoch], None] = lambda done: None,
) -> nn.Sequential:
    """A copy of `backbone` and a linear layer, [B, 3, S, S] -> [B, C], both trained. Arguments as in `finetune`.

    Every image is seen once an epoch, but for a batch of which a rank has fewer than two images, which have no batch
    statistics: it is left out. That is a rest at the end of an epoch, of other images in every epoch, or one that
    cannot be read. Several ranks take parts of each batch, which differ by one image at most; batch statistics and
    gradients are those of the whole batch, so that they do as one rank does but for the order in which they add.

    Raises:
        UserError: if there are fewer than two images a rank, or a batch has; if an image is unreadable; if the loss is
            not finite; if on several ranks the backbone's batch norms are of a kind that cannot be synchronised.
    """
    ranks, labels = ranks or Ranks.alone(), source.labels
    assert labels is not None
    assert int(labels[ids.numpy()].min()) >= 0
    assert int(labels[ids.numpy()].max()) < classes
    _check_sizes(len(ids), settings.batch_size, ranks)
    with _seeded(config.seed, device):
        network = _with_head(backbone, classes, config.views.size, device)
        layout = best_memory_format(network, device)
        network.to(device, memory_format=layout)  # type: ignore[call-overload]
        _synchronise(network, ranks)
        parallel = data_parallel(network, ranks, torch.zeros(_LEAST, 3, *[config.views.size] * 2, device=device))
        optimizer = torch.optim.SGD(
            [
                {"params": list(network[0].parameters()), "lr": settings.backbone_learning_rate},
                {"params": list(network[1].parameters()), "lr": settings.head_learning_rate},
            ],
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, settings.milestones, gamma=settings.decay)
        for epoch in range(settings.epochs):
            done = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right, images of this rank
            for batch in _batches(source, ids, epoch, config=config, device=device, settings=settings, ranks=ranks):
                counts = ranks.counts(0 if batch is None else len(batch.ids))
                if batch is None or min(counts) < _LEAST:
                    continue
                targets = torch.from_numpy(labels[batch.ids]).to(device)  # [b]
                logits = parallel(batch.views(device, config.views).contiguous(memory_format=layout))  # [b, C]
                loss = F.cross_entropy(logits.float(), targets, reduction="sum")
                optimizer.zero_grad(set_to_none=True)
                # Gradients are averaged over the ranks, and this loss is a summand of the whole batch's mean.
                (loss * (ranks.size / sum(counts))).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                right = (logits.detach().argmax(dim=1) == targets).sum()
                done += torch.stack([loss.detach().double(), right.double(), right.new_tensor(len(targets)).double()])
            total, right_in_all, images = ranks.sum(done).tolist()
            with ranks.report_on_main():
                if not images:
                    raise UserError("no batch has two readable images for each rank; repair the images, or use more")
                if not math.isfinite(total):
                    raise _diverged(f"the loss of epoch {epoch + 1} of {settings.epochs} is", settings)
            schedule.step()
            on_epoch(
                FinetuneEpoch(
                    epoch=epoch + 1, epochs=settings.epochs, loss=total / images, accuracy=right_in_all / images
                )
            )
    return network


def _with_head(backbone: nn.Module, classes: int, size: int, device: torch.device) -> nn.Sequential:
    """A copy of the backbone that takes gradients, in train mode, and a linear layer with random weights."""
    trunk = copy.deepcopy(backbone).to(device).eval()
    with torch.no_grad():
        features = trunk(torch.zeros(1, 3, size, size, device=device)).shape[1]
    # Drawn on the CPU: the same weights on every device.
    return nn.Sequential(trunk, nn.Linear(features, classes).to(device)).requires_grad_(True).train()


def _synchronise(network: nn.Sequential, ranks: Ranks) -> None:
    """Give the network batch norms over all ranks, in place.

    Raises:
        UserError: if there are batch norms that also do something else, which would be lost.
    """
    if ranks.size == 1:
        return
    norms = {type(part) for part in network.modules() if isinstance(part, _BatchNorm)}
    if strange := sorted(kind.__name__ for kind in norms.difference(_PLAIN_NORMS)):
        with ranks.report_on_main():
            raise UserError(
                f"the backbone has batch norms of another kind than torch's ({', '.join(strange)}), which cannot be "
                "synchronised over ranks; fine-tune it in one process"
            )
    synchronize_batch_norm(network, ranks)


def _batches(
    source: Source,
    ids: Tensor,
    epoch: int,
    *,
    config: Config,
    device: torch.device,
    settings: FinetuneSettings,
    ranks: Ranks,
) -> Iterator[EvalBatch | None]:
    """This rank's part of each batch of an epoch; None: it has none, or cannot read any of its images."""
    shuffled = ids.numpy()[epoch_order(len(ids), config.seed, epoch)]
    batches = (shuffled[start : start + settings.batch_size] for start in range(0, len(ids), settings.batch_size))
    parts = [whole[ranks.slice_of(len(whole))] for whole in batches]
    # All parts but the last are as long as the first, so that they are what is read together.
    readable = eval_batches(
        source,
        np.concatenate(parts),
        config=config,
        device=device,
        batch_size=len(parts[0]),
        view=settings.view,
        epoch=epoch,
    )
    return _aligned(parts, readable)


def _aligned(parts: list[NDArray[np.int64]], batches: Iterator[EvalBatch]) -> Iterator[EvalBatch | None]:
    """The batch of each of the `parts`; None for one of which no image is readable, which `batches` leave out."""
    batch = next(batches, None)
    for part in parts:
        if batch is not None and batch.ids[0] in part:
            yield batch
            batch = next(batches, None)
        else:
            yield None


@torch.no_grad()
def _score(
    network: nn.Sequential,
    test: Source,
    ids: Tensor,
    classes: int,
    *,
    config: Config,
    device: torch.device,
    settings: FinetuneSettings,
    ranks: Ranks,
) -> LinearScore:
    assert test.labels is not None
    network.eval()
    layout = best_memory_format(network, device)
    mine = ids.numpy()[ranks.slice_of(len(ids))]
    counts = torch.zeros(4, dtype=torch.int64, device=device)  # right, among the first five, images, not finite
    if len(mine):
        for batch in eval_batches(test, mine, config=config, device=device, batch_size=settings.batch_size):
            logits = network(batch.views(device, config.views).contiguous(memory_format=layout))  # [b, C]
            targets = torch.from_numpy(test.labels[batch.ids]).to(device)
            right = logits.topk(min(5, classes), dim=1).indices == targets.unsqueeze(1)  # [b, 5]
            broken = (~logits.isfinite().all(dim=1)).sum()
            counts += torch.stack([right[:, 0].sum(), right.sum(), broken.new_tensor(len(targets)), broken])
    top1, top5, images, broken_in_all = ranks.sum(counts).tolist()
    with ranks.report_on_main():
        if broken_in_all:
            raise _diverged(f"the logits of {broken_in_all:,} of {images:,} test images are", settings)
    return LinearScore(top1=top1, top5=top5 if classes > 5 else None, images=images)


def _check_sizes(images: int, batch_size: int, ranks: Ranks) -> None:
    least = _LEAST * ranks.size
    what = None
    if images < least:
        what = f"{images} images are too few to fine-tune on"
    elif batch_size < least:
        what = f"a batch of {batch_size} is too small to fine-tune with"
    if what is not None:
        with ranks.report_on_main():
            raise UserError(f"{what}: each of {ranks.size} ranks needs {_LEAST} a step; use more, or fewer ranks")


def _diverged(what: str, settings: FinetuneSettings) -> UserError:
    return UserError(
        f"fine-tuning diverged: {what} not finite; lower the learning rate of the linear layer "
        f"({settings.head_learning_rate:g}) or that of the backbone ({settings.backbone_learning_rate:g})"
    )


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's own generators begin with `seed` meanwhile, and afterwards are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
