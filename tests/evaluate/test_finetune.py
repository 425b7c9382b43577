import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pool import RankPool
from torch import Tensor, nn

from msf_faiss.config import Config, DemoData, NarrowBackbone, ViewsConfig
from msf_faiss.data.eval_batches import eval_batches
from msf_faiss.data.sampler import epoch_order
from msf_faiss.data.source import Reduce, UnreadableImageError
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.errors import PeerError, UserError
from msf_faiss.evaluate.finetune import (
    ONE_PERCENT,
    TEN_PERCENT,
    FinetuneSettings,
    finetune,
    published_settings,
    score_network,
)
from msf_faiss.evaluate.linear import AUGMENTATION, EpochProgress, TopScore
from msf_faiss.models import build_backbone

CPU = torch.device("cpu")
CONFIG = Config(seed=3, views=ViewsConfig(size=8))
SKIP = Config(seed=3, views=ViewsConfig(size=8), data=DemoData(unreadable="skip"))
QUICK = FinetuneSettings(backbone_learning_rate=0.02, head_learning_rate=0.1, epochs=2, batch_size=5)


class Drawn(MemorySource):
    """12 px images with a bright channel per class; some are unreadable."""

    def __init__(self, labels: Sequence[int], seed: int = 0, unreadable: Sequence[int] = ()) -> None:
        random = np.random.default_rng(seed)
        pixels = random.integers(60, size=(len(labels), 3, 12, 12))
        for image, label in zip(pixels, labels, strict=True):
            image[label % 3] += 130 if label < 3 else 60
        classes = tuple(map(str, range(max(labels) + 1)))
        super().__init__(torch.from_numpy(pixels.astype(np.uint8)), labels, classes, title="drawn")
        self.unreadable = set(unreadable)

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        if index in self.unreadable:
            raise UnreadableImageError(f"{self.name(index)}: broken")
        return super().decode(index, reduce)


class Flat(nn.Module):
    """A backbone without batch norms, which records the batch sizes."""

    batches: ClassVar[list[int]] = []

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.dropout = nn.Conv2d(3, 6, 3), nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.batches.append(len(images))
        features: Tensor = self.dropout(self.conv(images).relu()).mean(dim=(2, 3))
        return features


class OddNorm(nn.BatchNorm2d):
    pass


def backbone(kind: str = "norms") -> nn.Module:
    """Frozen and in eval mode, as the evaluations load it."""
    torch.manual_seed(0)
    if kind == "norms":
        network: nn.Module = build_backbone(NarrowBackbone(width=4, depths=(1,), strides=(2,)))[0]
    elif kind == "odd":
        network = nn.Sequential(nn.Conv2d(3, 4, 3), OddNorm(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:
        network = Flat(0.5 if kind == "dropout" else 0.0)
    return network.requires_grad_(False).eval()


def finetune_and_score(
    network: nn.Module,
    source: MemorySource,
    ids: Tensor,
    test: MemorySource,
    test_ids: Tensor,
    *,
    on_epoch: Callable[[EpochProgress], None] = lambda epoch: None,
    **common: Any,
) -> TopScore:
    return score_network(finetune(network, source, ids, on_epoch=on_epoch, **common), test, test_ids, **common)


def train(
    count: int = 14,
    *,
    kind: str = "norms",
    settings: FinetuneSettings = QUICK,
    config: Config = CONFIG,
    unreadable: Sequence[int] = (),
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """The weights after fine-tuning on `count` images of four classes."""
    source = Drawn([index % 4 for index in range(count)], unreadable=unreadable)
    options: Any = {"config": config, "device": CPU, "classes": 4, "settings": settings, "ranks": ranks}
    return finetune(backbone(kind), source, torch.arange(count), **options).state_dict()


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_published_settings() -> None:
    assert dataclasses.asdict(ONE_PERCENT) == {
        "backbone_learning_rate": 0.02,
        "head_learning_rate": 5.0,
        "epochs": 20,
        "batch_size": 256,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "decay": 0.2,
        "drops": (0.6, 0.8),
        "view": AUGMENTATION,
    }
    assert dataclasses.replace(ONE_PERCENT, backbone_learning_rate=0.01, head_learning_rate=0.2) == TEN_PERCENT
    assert TEN_PERCENT.milestones == [12, 16]
    assert dataclasses.replace(TEN_PERCENT, epochs=5).milestones == [3, 4]
    assert [published_settings(fraction, 12_811) is ONE_PERCENT for fraction in (0.001, 0.01, 0.03, 0.04, 0.1, 1)] == [
        *[True] * 3,
        *[False] * 3,
    ]
    assert [published_settings(0.01, images) is ONE_PERCENT for images in (500, 4_999, 5_000)] == [False, False, True]


def test_finetuning_learns_the_classes() -> None:
    source, test = Drawn([0, 1, 2] * 10), Drawn([0, 1, 2, 5] * 3, seed=1)
    settings = FinetuneSettings(backbone_learning_rate=0.05, head_learning_rate=0.5, epochs=8, batch_size=10)
    seen: list[EpochProgress] = []
    score = finetune_and_score(
        backbone(),
        source,
        torch.arange(30),
        test,
        torch.arange(12),
        config=CONFIG,
        device=CPU,
        classes=3,
        settings=settings,
        on_epoch=seen.append,
    )
    assert [(each.epoch, each.epochs) for each in seen] == [(epoch, 8) for epoch in range(1, 9)]
    assert seen[-1].loss < 0.2 * seen[0].loss
    assert seen[-1].accuracy == 1 > seen[0].accuracy
    # Class 5 has no training images: it is never predicted.
    assert (score.top1, score.images, score.mean_per_class) == (9, 12, 0.75)


def test_top5_after_finetuning_more_than_five_classes() -> None:
    source = Drawn([0, 1, 2, 3, 4, 5, 6] * 3)
    ids: Tensor = torch.arange(21)
    score = finetune_and_score(
        backbone(), source, ids, source, ids[:20], config=CONFIG, device=CPU, classes=7, settings=QUICK
    )
    assert score.top1 < score.top5 <= 20 == score.images


def test_two_steps_equal_explicit_sgd() -> None:
    """Momentum, weight decay, two learning rates and their drop, with the gradients of autograd."""
    settings = FinetuneSettings(
        backbone_learning_rate=0.1,
        head_learning_rate=0.7,
        epochs=2,
        batch_size=12,
        weight_decay=0.01,
        decay=0.3,
        drops=(0.5,),
    )
    source, count = Drawn([index % 4 for index in range(12)]), 12
    trunk = backbone().requires_grad_(True).train()
    torch.manual_seed(CONFIG.seed)
    head = nn.Linear(4, 4)
    start = copy.deepcopy((trunk.state_dict(), head.state_dict()))
    rates = {0: (0.1, 0.7), 1: (0.03, 0.21)}
    velocity: dict[nn.Parameter, Tensor] = {}
    for epoch in range(2):
        order = epoch_order(count, CONFIG.seed, epoch)
        (batch,) = eval_batches(source, order, config=CONFIG, batch_size=12, view=settings.view, epoch=epoch)
        assert source.labels is not None
        targets = torch.from_numpy(source.labels[order])
        trunk.zero_grad()
        head.zero_grad()
        logits = head(trunk(batch.views(CPU, CONFIG.views).contiguous()))
        (-logits.log_softmax(dim=1)[range(count), targets].mean()).backward()
        with torch.no_grad():
            for module, rate in zip((trunk, head), rates[epoch], strict=True):
                for parameter in module.parameters():
                    assert parameter.grad is not None
                    gradient = parameter.grad + 0.01 * parameter
                    velocity[parameter] = 0.9 * velocity.get(parameter, torch.zeros(())) + gradient
                    parameter -= rate * velocity[parameter]
    expected = {f"0.{name}": tensor for name, tensor in trunk.state_dict().items()}
    expected |= {f"1.{name}": tensor for name, tensor in head.state_dict().items()}
    weights = train(12, settings=settings)
    for name, tensor in expected.items():
        # float32 rounding over two steps
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6)
    for place, before in enumerate(start):
        assert not any(torch.equal(weights[f"{place}.{name}"], tensor) for name, tensor in before.items())


def test_finetuning_does_not_change_the_given_backbone() -> None:
    network, source = backbone(), Drawn([0, 1] * 5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    finetune(network, source, torch.arange(10), config=CONFIG, device=CPU, classes=2, settings=QUICK)
    assert same(network.state_dict(), before)
    assert not network.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("kind", ["norms", "dropout"])
def test_finetuning_depends_on_its_seed_only(kind: str) -> None:
    one = train(kind=kind)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    source = Drawn([index % 4 for index in range(14)])
    network = backbone(kind)
    torch.set_rng_state(before)
    options: Any = {"device": CPU, "classes": 4, "settings": QUICK}
    two = finetune(network, source, torch.arange(14), config=CONFIG, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, two.state_dict())
    assert not same(one, train(kind=kind, config=CONFIG.model_copy(update={"seed": 4})))


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 4]), (8, 4, [4, 4]), (3, 2, [2]), (2, 256, [2]), (7, 256, [7])],
)
def test_last_batch_of_one_image_is_dropped(count: int, batch_size: int, sizes: list[int]) -> None:
    Flat.batches.clear()
    train(count, kind="flat", settings=dataclasses.replace(QUICK, batch_size=batch_size))
    assert Flat.batches == sizes * 2


def test_too_few_images_are_refused() -> None:
    with pytest.raises(
        UserError, match="1 images are too few to fine-tune on: each of 1 ranks needs 2 images per step"
    ):
        train(1)
    with pytest.raises(UserError, match="a batch of 1 is too small"):
        train(4, settings=dataclasses.replace(QUICK, batch_size=1))


def test_divergence_names_the_learning_rates() -> None:
    wild = dataclasses.replace(QUICK, head_learning_rate=1e30)
    with pytest.raises(UserError, match=r"the loss of epoch 1 of 2 is not finite; lower the learning rate of .*1e\+30"):
        train(kind="flat", settings=wild)
    # After a single step its loss was finite, but not the weights.
    source, last = Drawn([0, 1, 2] * 4), dataclasses.replace(wild, epochs=1, batch_size=12, head_learning_rate=3e38)
    ids, options = torch.arange(12), {"config": CONFIG, "device": CPU, "classes": 3, "settings": last}
    with pytest.raises(UserError, match=r"the logits of [0-9]+ of 12 test images are not finite"):
        finetune_and_score(backbone("flat"), source, ids, source, ids, **options)


def test_unreadable_images_are_errors_or_left_out() -> None:
    with pytest.raises(UserError, match=r"drawn\[3\]: broken"):
        train(unreadable=[3])
    order = epoch_order(14, CONFIG.seed, 0)
    Flat.batches.clear()
    # Of the first epoch's batches, the first has three readable images, the second none, and the third one.
    broken = [*order[5:10], *order[11:14], *order[:2]]
    train(kind="flat", settings=dataclasses.replace(QUICK, epochs=1), config=SKIP, unreadable=broken)
    assert Flat.batches == [3]
    with pytest.raises(UserError, match="no batch has two readable images per rank"):
        train(kind="flat", config=SKIP, unreadable=order[:-1])


def finetune_together(ranks: Ranks, kind: str, tests: int) -> tuple[dict[str, Tensor], tuple[int, ...], list[float]]:
    source, test = Drawn([index % 4 for index in range(14)]), Drawn([index % 4 for index in range(tests)], seed=1)
    losses: list[float] = []
    options: Any = {"config": CONFIG, "device": CPU, "classes": 4, "settings": QUICK, "ranks": ranks}
    weights = finetune(backbone(kind), source, torch.arange(14), **options).state_dict()
    score = finetune_and_score(
        backbone(kind),
        source,
        torch.arange(14),
        test,
        torch.arange(tests),
        on_epoch=lambda epoch: losses.extend([epoch.loss, epoch.accuracy]),
        **options,
    )
    return weights, (score.top1, score.images), losses


@pytest.mark.parametrize(("kind", "tests"), [("flat", 7), ("norms", 7), ("norms", 1)])
def test_two_ranks_equal_one(pool: RankPool, kind: str, tests: int) -> None:
    """In batches of 5, 5 and 4, one rank has one image more, and thus a larger weight."""
    weights, score, losses = finetune_together(ALONE, kind, tests)
    first, second = pool.run(2, finetune_together, kind, tests)
    assert same(first[0], second[0])
    for name, tensor in weights.items():
        # another order of float32 sums, over six steps
        torch.testing.assert_close(first[0][name], tensor, rtol=1e-4, atol=1e-5)
    assert first[1] == second[1] == score
    assert first[2] == second[2] == pytest.approx(losses, rel=1e-4)


def fail_together(ranks: Ranks, what: str) -> str:
    wild = dataclasses.replace(QUICK, head_learning_rate=1e30)
    cases: dict[str, Any] = {
        "norms": {"kind": "odd"},
        "images": {"count": 3},
        "loss": {"kind": "flat", "settings": wild},
    }
    try:
        train(ranks=ranks, **cases[what])
    except PeerError as error:
        return f"peer: {error}"
    except UserError as error:
        return f"main: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("norms", "cannot synchronise batch norms of the type OddNorm"),
        ("images", "3 images are too few to fine-tune on: each of 2 ranks needs 2 images"),
        ("loss", "the loss of epoch 1 of 2 is not finite"),
    ],
)
def test_errors_are_reported_by_one_rank(pool: RankPool, what: str, complaint: str) -> None:
    main, peer = pool.run(2, fail_together, what)
    assert main.startswith("main: ")
    assert complaint in main
    assert peer == main.replace("main", "peer", 1)


def train_on_readable(ranks: Ranks, unreadable: list[int]) -> dict[str, Tensor]:
    return train(ranks=ranks, settings=dataclasses.replace(QUICK, epochs=1), config=SKIP, unreadable=unreadable)


def test_all_ranks_drop_a_batch_of_which_one_can_read_too_little(pool: RankPool) -> None:
    """Rank 0 can read no image of the first batch, rank 1 only one of the second; a single rank drops both."""
    order = epoch_order(14, CONFIG.seed, 0).tolist()
    one = train_on_readable(ALONE, order[:10])
    first, second = pool.run(2, train_on_readable, [*order[:3], order[8]])
    assert same(first, second)
    for name, tensor in one.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)  # as above


def test_last_batch_of_one_image_per_rank_is_dropped(pool: RankPool) -> None:
    order = epoch_order(13, CONFIG.seed, 0).tolist()  # 5, 5 and 3, of which rank 1 would get one
    settings = dataclasses.replace(QUICK, epochs=1)
    expected = train(13, settings=settings, config=SKIP, unreadable=order[10:])
    weights = pool.run(2, train_thirteen)[1]
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)  # as above


def train_thirteen(ranks: Ranks) -> dict[str, Tensor]:
    return train(13, ranks=ranks, settings=dataclasses.replace(QUICK, epochs=1))
