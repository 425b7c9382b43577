"""Linear probe: one linear layer trained on frozen features, by the protocol of MSF (section 4).

Features are L2-normalised, then standardised by the training set's mean and variance, which are computed once from
centre views; then a linear layer is trained with SGD. In the full protocol, each epoch sees new random crops and flips
of the training images; the fast one trains on the features of their centre views.

The paper's 40 epochs are 200,000 steps on ImageNet, and 2,040 on 1 % of it, but 40 on 40 images, where the layer is far
from its optimum. On fewer images than that 1 % there are more epochs, until `MIN_STEPS` steps; in the full protocol
they repeat the views of the first 40.

Shapes: N training images, B of a batch, F features, C classes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_faiss.config import Config, WeakView
from msf_faiss.data.eval_batches import eval_batches
from msf_faiss.data.sampler import epoch_order
from msf_faiss.data.source import Source
from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.embeddings.extract import Features
from msf_faiss.evaluate.accuracy import mean_per_class

LEARNING_RATE = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
BATCH_SIZE = 256
EPOCHS = 40
MIN_STEPS = 4000  # on few images
_FEW = 12_811  # images: 1 % of ImageNet's have the paper's protocol
_DROPS = (15 / 40, 30 / 40)  # fractions of the epochs after which the learning rate falls to a tenth
AUGMENTATION = WeakView(crop_scale=(0.08, 1.0), flip=0.5)
_FALL = 0.02  # of the mean loss, in nats; a smaller fall hardly changes a decision
EPSILON = 1e-5  # added to each variance, as in the authors' code

FeatureBatches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""From an epoch (0, 1, ...) to its batches: raw features [B, F] and labels [B] int64, on one device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochProgress:
    """Loss and accuracy of one epoch of a classifier."""

    epoch: int  # completed epochs
    epochs: int
    loss: float  # mean over the training images since the last progress, each before the step that used it
    accuracy: float  # 0..1
    images: Literal["training", "held-out"]  # those of `accuracy`


@dataclass(frozen=True, slots=True, kw_only=True)
class TopScore:
    """Correctly classified held-out images after the last epoch (not the best one)."""

    top1: int  # images whose class has the largest logit
    top5: int  # images whose class is among the five largest logits
    images: int
    mean_per_class: float  # 0..1, of top 1
    converged: bool = True  # False: the training loss was still falling, see `still_falls`


class Standardize(nn.Module):
    """L2-normalise, subtract a fixed mean, divide by a fixed standard deviation: [B, F] -> [B, F]."""

    mean: Tensor
    scale: Tensor

    def __init__(self, features: Tensor) -> None:
        """`features` [N, F]: of the training set, not normalised."""
        super().__init__()
        variance, mean = torch.var_mean(F.normalize(features, dim=1), dim=0, correction=0)  # [F] each
        self.register_buffer("mean", mean)
        self.register_buffer("scale", (variance + EPSILON).rsqrt())

    def forward(self, features: Tensor) -> Tensor:
        return (F.normalize(features, dim=1) - self.mean) * self.scale


def milestones(epochs: int) -> list[int]:
    """Epochs after which the learning rate falls to a tenth: 15 and 30 of 40."""
    return [round(fraction * epochs) for fraction in _DROPS]


def default_epochs(images: int) -> int:
    """The paper's 40, or as many as make `MIN_STEPS` steps on fewer training images than 1 % of ImageNet."""
    if images >= _FEW:
        return EPOCHS
    return max(EPOCHS, math.ceil(MIN_STEPS / math.ceil(images / BATCH_SIZE)))


def still_falls(losses: Sequence[float], drop: int) -> bool:
    """Whether training ended before its loss did not fall any more.

    After the learning rate has dropped, the loss hardly falls, however far it is from its minimum. So this compares the
    last two quarters of the time before.

    Args:
        losses: means of the same number of epochs each.
        drop: number of losses before the first drop.
    """
    part = drop // 4
    if part == 0:
        return len(losses) > 1 and losses[0] - losses[-1] > _FALL
    return float(np.mean(losses[drop - 2 * part : drop - part]) - np.mean(losses[drop - part : drop])) > _FALL


def train_probe(
    batches: FeatureBatches,
    train: Features,
    test: Features,
    *,
    classes: int,
    device: torch.device,
    seed: int,
    epochs: int = EPOCHS,
    on_epoch: Callable[[EpochProgress], None] = lambda epoch: None,
) -> TopScore:
    """Train the linear layer and score it on the held-out images.

    Args:
        batches: training batches, from `cached_batches` or `augmented_batches`.
        train: centre-view features of the training images, for their mean and variance.
        test: centre-view features of labelled held-out images; a class >= `classes` is never predicted.
        classes: C, larger than every training label.
        device: of the batches, and where to train.
        seed: of the layer's initial weights.
        epochs: 40 in the paper; the learning rate falls after 15/40 and 30/40 of them.
        on_epoch: called after each epoch; of many epochs, about 40 times.
    """
    assert test.labels is not None
    standardize = Standardize(train.embeddings).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = nn.Linear(train.embeddings.shape[1], classes)
    linear = linear.to(device)
    optimizer = torch.optim.SGD(linear.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones(epochs), gamma=0.1)
    held_out = standardize(test.embeddings.to(device))  # [M, F]
    labels = test.labels.to(device)
    score = _score(linear, held_out, labels)
    losses: list[float] = []
    every = max(1, epochs // EPOCHS)  # a score for each of 2,000 epochs would take longer than training
    total, images = torch.zeros((), device=device), 0
    for epoch in range(epochs):
        for features, targets in batches(epoch):
            loss = F.cross_entropy(linear(standardize(features)), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach() * len(targets)
            images += len(targets)
        schedule.step()
        if (epoch + 1) % every and epoch + 1 < epochs:
            continue
        score = _score(linear, held_out, labels)
        losses.append(float(total) / images)
        total, images = torch.zeros((), device=device), 0
        on_epoch(
            EpochProgress(
                epoch=epoch + 1,
                epochs=epochs,
                loss=losses[-1],
                accuracy=score.top1 / score.images,
                images="held-out",
            )
        )
    return replace(score, converged=not still_falls(losses, milestones(epochs)[0] // every))


def cached_batches(train: Features, *, seed: int, device: torch.device) -> FeatureBatches:
    """The fast protocol: the same centre-view features in each epoch, in a new order."""
    assert train.labels is not None
    features, labels = train.embeddings.to(device), train.labels.to(device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(epoch_order(len(features), seed, epoch)).to(device)
        for rows in torch.split(order, BATCH_SIZE):
            yield features[rows], labels[rows]

    return batches


def augmented_batches(
    encoder: nn.Module,
    source: Source,
    train: Features,
    *,
    config: Config,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> FeatureBatches:
    """The full protocol: features of a new random crop and flip of each image in each epoch.

    Args:
        encoder: [B, 3, S, S] -> [B, F] on `device`, in eval mode.
        source: labelled images.
        train: features of the training images, for their ids and F.
        config: its seed determines order and crops, its views the size of a crop.
        device: where to compute.
        ranks: that take turns to compute the batches; each gets all of them, as one rank alone would compute them.
    """
    assert not encoder.training, "in train mode, the backbone's batch statistics would change"
    labels = source.labels
    assert labels is not None
    width = train.embeddings.shape[1]

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = train.ids.numpy()[epoch_order(len(train.ids), config.seed, epoch)]
        chunks = [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
        own = np.concatenate([order[:0], *chunks[ranks.rank :: ranks.size]])
        views = eval_batches(
            source, own, config=config, device=device, batch_size=BATCH_SIZE, view=AUGMENTATION, epoch=epoch
        )
        with contextlib.closing(views):
            for _ in range(0, len(chunks), ranks.size):
                features = torch.empty(0, width, device=device)  # [b, F]; in the last turn a rank may have no batch
                targets = torch.empty(0, dtype=torch.int64, device=device)  # [b]
                if (batch := next(views, None)) is not None:
                    with torch.no_grad():
                        features = encoder(batch.views(device, config.views)).float()
                    targets = torch.from_numpy(labels[batch.ids]).to(device)
                counts = [count for count in ranks.counts(len(targets)) if count]
                gathered = (ranks.gather_rows(features), ranks.gather_rows(targets))
                yield from zip(*(torch.split(rows, counts) for rows in gathered), strict=True)

    return batches


def repeated_batches(batches: FeatureBatches, epochs: int) -> FeatureBatches:
    """The batches of the first `epochs` epochs again and again: their features are computed once, and kept."""
    kept: list[list[tuple[Tensor, Tensor]]] = []

    def repeat(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        if epoch < epochs:
            kept.append([])
            for features, targets in batches(epoch):
                kept[-1].append((features.cpu(), targets))
                yield features, targets
        else:
            yield from ((features.to(targets.device), targets) for features, targets in kept[epoch % epochs])

    return repeat


@torch.no_grad()
def _score(linear: nn.Linear, features: Tensor, labels: Tensor) -> TopScore:
    top = min(5, linear.out_features)
    guesses = torch.cat([linear(part).topk(top, dim=1).indices for part in torch.split(features, 4096)])  # [M, top]
    correct = guesses == labels.unsqueeze(1)
    return TopScore(
        top1=int(correct[:, 0].sum()),
        top5=int(correct.any(dim=1).sum()),
        images=len(labels),
        mean_per_class=mean_per_class(guesses[:, 0].cpu().numpy(), labels.cpu().numpy()),
    )
