"""Fine-tune a backbone on few labels: semi-supervised evaluation.

The protocol of SwAV (Caron et al. 2020; settings from `eval_semisup.py` in its code) for ResNet-50 and 1 % or 10 % of
ImageNet: a linear layer on the backbone, both trained for 20 epochs by SGD without weight decay at separate learning
rates, which fall to a fifth after epochs 12 and 16; random crops and flips; batch statistics of the whole batch. SwAV
reports the epoch with the best test accuracy, we report the last.

Shapes: N training images, B of a batch, b of this rank's part of it, S pixels of a view's side, C classes.
"""

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
from msf_faiss.data.sampler import FEWEST_IMAGES, epoch_order
from msf_faiss.data.source import Source
from msf_faiss.distributed.batch_norm import synchronize_batch_norm
from msf_faiss.distributed.ranks import ALONE, Ranks, data_parallel
from msf_faiss.errors import UserError
from msf_faiss.evaluate.accuracy import mean_per_class
from msf_faiss.evaluate.linear import AUGMENTATION, EpochProgress, TopScore
from msf_faiss.models import best_memory_format

_FEWEST_FOR_ONE_PERCENT = 5_000  # images
_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """Hyperparameters of fine-tuning."""

    backbone_learning_rate: float
    head_learning_rate: float  # of the new linear layer
    epochs: int = 20
    batch_size: int = 256  # images per step, of all ranks together
    momentum: float = 0.9
    weight_decay: float = 0.0
    decay: float = 0.2  # factor of the learning rates at each drop
    drops: tuple[float, ...] = (12 / 20, 16 / 20)  # fractions of the epochs
    view: WeakView = AUGMENTATION  # crops of 8 to 100 % of the area, and flips

    @property
    def milestones(self) -> list[int]:
        """Epochs after which the learning rates drop: 12 and 16 of 20."""
        return [round(fraction * self.epochs) for fraction in self.drops]


ONE_PERCENT = FinetuneSettings(backbone_learning_rate=0.02, head_learning_rate=5.0)
TEN_PERCENT = FinetuneSettings(backbone_learning_rate=0.01, head_learning_rate=0.2)


def published_settings(fraction: float, images: int) -> FinetuneSettings:
    """The published settings (1 % or 10 %) closest to a fraction of the labels, on a logarithmic scale.

    The settings for 1 % were tuned on 12,811 images. On few images, the layer's learning rate of 5 drives the network
    to chance: 9 % accuracy on 500 images of CIFAR-10, 36 % with the rates for 10 %. So with fewer than 5,000 images the
    settings for 10 % are used.
    """
    few_labels = fraction < math.sqrt(0.01 * 0.1)
    return ONE_PERCENT if few_labels and images >= _FEWEST_FOR_ONE_PERCENT else TEN_PERCENT


def finetune(
    backbone: nn.Module,
    source: Source,
    ids: Tensor,
    *,
    config: Config,
    device: torch.device,
    classes: int,
    settings: FinetuneSettings,
    ranks: Ranks = ALONE,
    on_epoch: Callable[[EpochProgress], None] = lambda epoch: None,
) -> nn.Sequential:
    """Train a copy of `backbone` with a new linear layer: [B, 3, S, S] -> [B, C].

    Each epoch uses every image once, but drops a batch in which a rank has fewer than two images, too few for batch
    statistics: the rest at the end of an epoch (other images each epoch), or a batch of unreadable images. Ranks train
    on parts of each batch whose sizes differ by at most one; batch statistics and gradients are those of the whole
    batch, so that the result differs from one rank's only by the order of summation.

    Args:
        backbone: [B, 3, S, S] -> [B, F]; not changed.
        source: of the training images.
        ids: [N] int64, the training images, all labelled.
        config: its seed determines the layer's initial weights, order and crops, its views the size of a crop.
        device: where to compute.
        classes: C, larger than every training label.
        settings: of the training.
        ranks: that train together.
        on_epoch: called after each epoch, on every rank.

    Raises:
        UserError: if there are fewer than two images per rank in all or in a batch, an image is unreadable, the loss is
            not finite, or batch norms of the backbone cannot be synchronised over several ranks.
    """
    labels = source.labels
    assert labels is not None
    assert int(labels[ids.numpy()].min()) >= 0
    assert int(labels[ids.numpy()].max()) < classes
    _check_sizes(len(ids), settings.batch_size, ranks)
    with _seeded(config.seed, device):
        network = _add_head(backbone, classes, config.views.size, device)
        layout = best_memory_format(network, device)
        network.to(device, memory_format=layout)  # type: ignore[call-overload]
        _synchronize_norms(network, ranks)
        example = torch.zeros(FEWEST_IMAGES, 3, *[config.views.size] * 2, device=device)
        parallel = data_parallel(network, ranks, example)
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
            sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images of this rank
            for batch in _batches(source, ids, epoch, config=config, device=device, settings=settings, ranks=ranks):
                counts = ranks.counts(0 if batch is None else len(batch.ids))
                if batch is None or min(counts) < FEWEST_IMAGES:
                    continue
                targets = torch.from_numpy(labels[batch.ids]).to(device)  # [b]
                logits = parallel(batch.views(device, config.views).contiguous(memory_format=layout))  # [b, C]
                loss = F.cross_entropy(logits.float(), targets, reduction="sum")
                optimizer.zero_grad(set_to_none=True)
                # Ranks average their gradients, and this loss is one rank's term of the mean over the whole batch.
                (loss * (ranks.size / sum(counts))).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                correct = (logits.detach().argmax(dim=1) == targets).sum()
                images = correct.new_tensor(len(targets))
                sums += torch.stack([loss.detach().double(), correct.double(), images.double()])
            progress = _finish_epoch(ranks.sum(sums), epoch, settings, ranks)
            schedule.step()
            on_epoch(progress)
    return network


def _finish_epoch(sums: Tensor, epoch: int, settings: FinetuneSettings, ranks: Ranks) -> EpochProgress:
    total, correct, images = sums.tolist()
    with ranks.report_on_main():
        if not images:
            raise UserError("no batch has two readable images per rank; repair the images, or use more")
        if not math.isfinite(total):
            raise _diverged(f"the loss of epoch {epoch + 1} of {settings.epochs} is", settings)
    return EpochProgress(
        epoch=epoch + 1, epochs=settings.epochs, loss=total / images, accuracy=correct / images, images="training"
    )


def _add_head(backbone: nn.Module, classes: int, size: int, device: torch.device) -> nn.Sequential:
    """A trainable copy of the backbone, in train mode, with a randomly initialised linear layer."""
    trunk = copy.deepcopy(backbone).to(device).eval()
    with torch.no_grad():
        features = trunk(torch.zeros(1, 3, size, size, device=device)).shape[1]
    # The layer is initialised on the CPU, so that every device starts from the same weights.
    return nn.Sequential(trunk, nn.Linear(features, classes).to(device)).requires_grad_(True).train()


def _synchronize_norms(network: nn.Sequential, ranks: Ranks) -> None:
    """Make the network's batch norms use the statistics of all ranks, in place.

    Raises:
        UserError: if one is of a subclass, whose extra behaviour would be lost.
    """
    if ranks.size == 1:
        return
    norms = {type(part) for part in network.modules() if isinstance(part, _BatchNorm)}
    if unknown := sorted(kind.__name__ for kind in norms.difference(_PLAIN_NORMS)):
        with ranks.report_on_main():
            raise UserError(
                f"cannot synchronise batch norms of the type {', '.join(unknown)} over ranks; fine-tune this backbone "
                "in one process"
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
    """This rank's part of each batch of an epoch; None if it has no images, or none that is readable."""
    shuffled = ids.numpy()[epoch_order(len(ids), config.seed, epoch)]
    batches = (shuffled[start : start + settings.batch_size] for start in range(0, len(ids), settings.batch_size))
    parts = [batch[ranks.slice_of(len(batch))] for batch in batches]
    # All parts but the last have the size of the first, so `eval_batches` divides their concatenation in the same way.
    readable = eval_batches(
        source,
        np.concatenate(parts),
        config=config,
        device=device,
        batch_size=len(parts[0]),
        view=settings.view,
        epoch=epoch,
    )
    return _align(parts, readable)


def _align(parts: list[NDArray[np.int64]], batches: Iterator[EvalBatch]) -> Iterator[EvalBatch | None]:
    """The batch of each part; None for a part without readable images, which `batches` leave out."""
    batch = next(batches, None)
    for part in parts:
        if batch is not None and batch.ids[0] in part:
            yield batch
            batch = next(batches, None)
        else:
            yield None


@torch.no_grad()
def score_network(
    network: nn.Module,
    test: Source,
    ids: Tensor,
    *,
    config: Config,
    device: torch.device,
    classes: int,
    settings: FinetuneSettings,
    ranks: Ranks = ALONE,
) -> TopScore:
    """Score a fine-tuned network on centre views of the labelled images `ids` [M], which the ranks share.

    A class >= `classes` is never predicted. Other arguments as in `finetune`.

    Raises:
        UserError: if an image is unreadable, or logits are not finite.
    """
    assert test.labels is not None
    network.eval()
    layout = best_memory_format(network, device)
    own = ids.numpy()[ranks.slice_of(len(ids))]
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # top 5, images with invalid logits
    guesses, labels = [counts[:0]], [counts[:0]]  # top 1, and the truth
    if len(own):
        for batch in eval_batches(test, own, config=config, device=device, batch_size=settings.batch_size):
            logits = network(batch.views(device, config.views).contiguous(memory_format=layout))  # [b, C]
            targets = torch.from_numpy(test.labels[batch.ids]).to(device)
            top = logits.topk(min(5, classes), dim=1).indices  # [b, 5]
            broken = (~logits.isfinite().all(dim=1)).sum()
            counts += torch.stack([(top == targets.unsqueeze(1)).sum(), broken])
            guesses.append(top[:, 0])
            labels.append(targets)
    top5, broken_images = ranks.sum(counts).tolist()
    guessed, truth = (ranks.gather_rows(torch.cat(rows)).cpu().numpy() for rows in (guesses, labels))  # [M]
    with ranks.report_on_main():
        if broken_images:
            raise _diverged(f"the logits of {broken_images:,} of {len(truth):,} test images are", settings)
    return TopScore(
        top1=int((guessed == truth).sum()),
        top5=top5,
        images=len(truth),
        mean_per_class=mean_per_class(guessed, truth),
    )


def _check_sizes(images: int, batch_size: int, ranks: Ranks) -> None:
    fewest = FEWEST_IMAGES * ranks.size
    problem = None
    if images < fewest:
        problem = f"{images} images are too few to fine-tune on"
    elif batch_size < fewest:
        problem = f"a batch of {batch_size} is too small to fine-tune with"
    if problem is not None:
        with ranks.report_on_main():
            raise UserError(
                f"{problem}: each of {ranks.size} ranks needs {FEWEST_IMAGES} images per step; use more images, "
                "or fewer ranks"
            )


def _diverged(what: str, settings: FinetuneSettings) -> UserError:
    return UserError(
        f"fine-tuning diverged: {what} not finite; lower the learning rate of the linear layer "
        f"({settings.head_learning_rate:g}) or of the backbone ({settings.backbone_learning_rate:g})"
    )


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for the block, and restore their state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
