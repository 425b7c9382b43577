from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from msf_faiss.config import Config, NarrowBackbone, ViewsConfig
from msf_faiss.data.sampler import epoch_order
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.embeddings.extract import Features, extract
from msf_faiss.evaluate import linear
from msf_faiss.evaluate.linear import (
    BATCH_SIZE,
    EPOCHS,
    EpochProgress,
    Standardize,
    TopScore,
    augmented_batches,
    cached_batches,
    default_epochs,
    milestones,
    repeated_batches,
    still_falls,
    train_probe,
)
from msf_faiss.evaluate.logistic import train_logistic
from msf_faiss.models import build_backbone

CPU = torch.device("cpu")
CONFIG = Config(views=ViewsConfig(size=8))


def clusters(count: int, classes: int, seed: int, dim: int = 6, spread: float = 1.5) -> Features:
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=count)
    centres = np.random.default_rng(99).normal(size=(classes, dim)) + 3  # far from the origin: the mean matters
    points = centres[labels] + spread * random.normal(size=(count, dim))
    return Features(torch.from_numpy(points).float(), torch.from_numpy(labels), torch.arange(count))


def standardize(features: NDArray[np.float64], train: NDArray[np.float64]) -> NDArray[np.float64]:
    """The paper's normalisation, in float64."""

    def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    mean, variance = unit(train).mean(0), unit(train).var(0)
    result: NDArray[np.float64] = (unit(features) - mean) / np.sqrt(variance + 1e-5)
    return result


def slow_probe(
    train: Features, test: Features, *, classes: int, seed: int, epochs: int
) -> tuple[list[float], list[int]]:
    """Losses by epoch and final predictions, in float64 NumPy with an explicit gradient of the cross-entropy."""
    assert train.labels is not None
    torch.manual_seed(seed)
    layer = nn.Linear(train.embeddings.shape[1], classes)
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    points, labels = train.embeddings.double().numpy(), train.labels.numpy()
    x = standardize(points, points)
    momentum = [np.zeros_like(weight), np.zeros_like(bias)]
    losses = []
    for epoch in range(epochs):
        rate = 0.01 * 0.1 ** sum(epoch >= milestone for milestone in milestones(epochs))
        order = epoch_order(len(x), seed, epoch)
        total = 0.0
        for start in range(0, len(x), 256):
            rows = order[start : start + 256]
            logits = x[rows] @ weight.T + bias
            probabilities = np.exp(logits - logits.max(1, keepdims=True))
            probabilities /= probabilities.sum(1, keepdims=True)
            total -= np.log(probabilities[np.arange(len(rows)), labels[rows]]).sum()
            probabilities[np.arange(len(rows)), labels[rows]] -= 1
            gradients = [probabilities.T @ x[rows] / len(rows) + 1e-4 * weight, probabilities.mean(0) + 1e-4 * bias]
            momentum = [0.9 * m + g for m, g in zip(momentum, gradients, strict=True)]
            weight, bias = weight - rate * momentum[0], bias - rate * momentum[1]
        losses.append(total / len(x))
    guesses = standardize(test.embeddings.double().numpy(), points) @ weight.T + bias
    return losses, guesses.argmax(1).tolist()


@pytest.mark.parametrize("count", [1, 256, 700])  # one image; one batch; two batches and a rest
def test_probe_equals_numpy(count: int) -> None:
    train, test = clusters(count, 4, seed=1), clusters(150, 4, seed=2)
    assert train.labels is not None
    train.labels[0] = 3
    seen: list[EpochProgress] = []
    score = train_probe(
        cached_batches(train, seed=5, device=CPU),
        train,
        test,
        classes=4,
        device=CPU,
        seed=5,
        epochs=8,
        on_epoch=seen.append,
    )
    losses, guesses = slow_probe(train, test, classes=4, seed=5, epochs=8)
    # float32 against float64: rounding errors do not grow over at most 24 steps of a convex problem
    assert [epoch.loss for epoch in seen] == pytest.approx(losses, rel=1e-4)
    assert test.labels is not None
    assert score.top1 == int((torch.tensor(guesses) == test.labels).sum())
    assert (score.top5, score.images) == (150, 150)  # among the five best of four classes
    assert [(each.epoch, each.epochs) for each in seen] == [(epoch, 8) for epoch in range(1, 9)]
    assert seen[-1].accuracy == score.top1 / 150


def test_hyperparameters_of_the_paper() -> None:
    assert (linear.LEARNING_RATE, linear.MOMENTUM, linear.WEIGHT_DECAY) == (0.01, 0.9, 1e-4)
    assert (linear.EPOCHS, milestones(linear.EPOCHS), BATCH_SIZE) == (40, [15, 30], 256)
    assert linear.AUGMENTATION.crop_scale == (0.08, 1.0)
    assert linear.AUGMENTATION.flip == 0.5


@pytest.mark.parametrize(
    ("images", "epochs"),
    [(1, 4000), (40, 4000), (256, 4000), (257, 2000), (400, 2000), (4_000, 250), (12_810, 79), (12_811, 40)],
)
def test_few_images_get_more_epochs_than_the_paper(images: int, epochs: int) -> None:
    assert linear.default_epochs(images) == epochs


def test_probe_on_few_labels_is_trained_to_its_end() -> None:
    """As logistic regression shows; the paper's 40 epochs are 40 steps here, which end far from the optimum."""
    train, test = clusters(40, 4, seed=0, dim=64), clusters(400, 4, seed=1, dim=64)
    options: dict[str, Any] = {"classes": 4, "device": CPU, "seed": 0}

    def probe(epochs: int) -> TopScore:
        return train_probe(cached_batches(train, seed=0, device=CPU), train, test, epochs=epochs, **options)

    paper, longer = probe(EPOCHS), probe(default_epochs(40) // 8)
    assert (paper.converged, longer.converged) == (False, True)
    assert longer.top1 > paper.top1
    assert abs(longer.top1 - train_logistic(train, test, seed=0, penalties=[1e-3]).correct) < 12  # of 400


@pytest.mark.parametrize(
    ("losses", "drop", "falls"),
    [
        ([2.3 - 0.1 * epoch for epoch in range(15)] + [0.9] * 25, 15, True),  # flat, but only since the rate dropped
        ([2.0 * 0.3**epoch for epoch in range(15)] + [0.0] * 25, 15, False),
        ([2.3, 1.9], 1, True),
        ([2.3, 2.4], 1, False),
        ([2.3], 0, False),
    ],
)
def test_a_loss_still_falls(losses: list[float], drop: int, falls: bool) -> None:
    assert still_falls(losses, drop) == falls


def test_repeated_batches_are_computed_once() -> None:
    asked = []

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        asked.append(epoch)
        yield torch.full((2, 3), float(epoch)), torch.tensor([0, 1])

    repeated = repeated_batches(batches, 3)
    seen = [features[0, 0].item() for epoch in range(7) for features, _ in repeated(epoch)]
    assert (asked, seen) == ([0, 1, 2], [0, 1, 2, 0, 1, 2, 0])


def test_standardized_training_features_have_mean_0_and_variance_1() -> None:
    train = clusters(500, 4, seed=0).embeddings
    standardized = Standardize(train)(train)
    assert standardized.mean(0).abs().max() < 1e-5
    assert standardized.var(0).numpy() == pytest.approx(1, rel=0.01)  # EPSILON is small against variances of about 0.01
    assert Standardize(train)(train * 8).equal(standardized)  # norms do not matter; scaling by 8 is exact


def test_constant_features_are_not_divided_by_zero() -> None:
    standardized = Standardize(torch.ones(9, 3))(torch.ones(2, 3))
    assert standardized.abs().max() < 1e-3


def test_top5_of_probe_with_more_than_five_classes() -> None:
    train, test = clusters(400, 8, seed=0), clusters(200, 8, seed=1)
    score = train_probe(cached_batches(train, seed=0, device=CPU), train, test, classes=8, device=CPU, seed=0, epochs=4)
    assert score.top1 < score.top5 <= 200
    unknown = Features(test.embeddings, torch.full((200,), 8), test.ids)  # a class without training images
    none = train_probe(
        cached_batches(train, seed=0, device=CPU), train, unknown, classes=8, device=CPU, seed=0, epochs=4
    )
    assert (none.top1, none.top5) == (0, 0)


def test_probe_depends_on_its_seed_only() -> None:
    train, test = clusters(300, 4, seed=0), clusters(60, 4, seed=1)

    def losses(seed: int) -> list[float]:
        seen: list[EpochProgress] = []
        batches = cached_batches(train, seed=seed, device=CPU)
        train_probe(batches, train, test, classes=4, device=CPU, seed=seed, epochs=3, on_epoch=seen.append)
        return [epoch.loss for epoch in seen]

    before = torch.get_rng_state()
    assert losses(1) == losses(1) != losses(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def source() -> MemorySource:
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(256, size=(40, 3, 12, 12), dtype=np.uint8))
    return MemorySource(pixels, [*range(4)] * 9 + [-1] * 4, ("a", "b", "c", "d"), title="noise")


@pytest.fixture
def backbone() -> nn.Module:
    torch.manual_seed(0)
    network, _ = build_backbone(NarrowBackbone(width=4, depths=(1,), strides=(2,)))
    return network.requires_grad_(False).eval()


def concatenate(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    features, labels = zip(*batches, strict=True)
    return torch.cat(features), torch.cat(labels)


def without_features(ids: Tensor) -> Features:
    """Features of the images to train on, of which only ids and width matter."""
    return Features(torch.empty(len(ids), 4), None, ids)


def test_augmented_batches_draw_new_crops_each_epoch(
    source: MemorySource, backbone: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "BATCH_SIZE", 16)
    ids = torch.arange(36)
    batches = augmented_batches(backbone, source, without_features(ids), config=CONFIG, device=CPU)
    assert [len(labels) for _, labels in batches(0)] == [16, 16, 4]
    first, again, second = concatenate(batches(0)), concatenate(batches(0)), concatenate(batches(1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0].sort(dim=0).values, second[0].sort(dim=0).values)
    assert not torch.equal(first[1], second[1])  # another order
    for _, labels in (first, second):
        assert labels.bincount().tolist() == [9, 9, 9, 9]


def test_probe_does_not_change_the_backbone(source: MemorySource) -> None:
    """Even if its parameters require gradients, and its batch statistics would change in train mode."""
    torch.manual_seed(0)
    backbone, _ = build_backbone(NarrowBackbone(width=4, depths=(1, 1), strides=(2, 1)))
    backbone.eval()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    assert any("running_var" in name for name in before)
    ids = torch.arange(36)
    train = extract(backbone, source, config=CONFIG, device=CPU, ids=ids)
    batches = augmented_batches(backbone, source, train, config=CONFIG, device=CPU)
    train_probe(batches, train, train, classes=4, device=CPU, seed=0, epochs=3)
    after = backbone.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_backbone_in_train_mode_is_refused(source: MemorySource, backbone: nn.Module) -> None:
    with pytest.raises(AssertionError, match="train mode"):
        augmented_batches(backbone.train(), source, without_features(torch.arange(4)), config=CONFIG, device=CPU)
