from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msf_faiss.config import Config, FolderData, ViewsConfig
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.embeddings.extract import Features
from msf_faiss.errors import UserError
from msf_faiss.evaluate import knn as module
from msf_faiss.evaluate.inputs import has_held_out, labelled_ids, sample
from msf_faiss.evaluate.knn import KnnScore, evaluate_knn, knn_scores
from msf_faiss.evaluate.vote import majority_vote, weighted_vote

CPU = torch.device("cpu")
CONFIG = Config(views=ViewsConfig(size=8, mean=(0, 0, 0), std=(1, 1, 1)))


def features(count: int, classes: int, seed: int, dim: int = 6) -> Features:
    """Loose clusters, one a class."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=count)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    points = centres[labels] + random.normal(size=(count, dim))
    return Features(torch.from_numpy(points).float(), torch.from_numpy(labels), torch.arange(count) * 3)


def slow_scores(bank: Features, queries: Features | None, k: int, temperature: float | None) -> tuple[int, int]:
    """Correct and all, by a dense float64 matrix and one query at a time."""
    assert bank.labels is not None
    asked = bank if queries is None else queries
    assert asked.labels is not None
    base = nn.functional.normalize(bank.embeddings, dim=1).double()
    correct = 0
    for row, (embedding, label) in enumerate(zip(asked.embeddings, asked.labels.tolist(), strict=True)):
        similarities = base @ nn.functional.normalize(embedding, dim=0).double()
        others = [i for i in range(len(base)) if queries is not None or i != row]
        nearest = sorted(others, key=lambda i: (-float(similarities[i].float()), i))[:k]
        votes = bank.labels[nearest][None], similarities[nearest].float()[None], 100
        elected = majority_vote(*votes) if temperature is None else weighted_vote(*votes, temperature)
        correct += int(elected) == label
    return correct, len(asked.ids)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_scores_equal_a_dense_search(leave_one_out: bool) -> None:
    bank = features(70, 4, seed=1)
    queries = None if leave_one_out else features(50, 5, seed=2)  # a class that the bank lacks is never right
    scores = knn_scores(bank, queries, ks=[20, 1, 5, 5], temperatures=[0.5, 0.07, 0.5], device=CPU)
    assert [(score.k, score.temperature) for score in scores] == [
        (1, None),
        (5, None),
        (5, 0.07),
        (5, 0.5),
        (20, None),
        (20, 0.07),
        (20, 0.5),
    ]
    for score in scores:
        assert (score.correct, score.images) == slow_scores(bank, queries, score.k, score.temperature)
        assert score.leave_one_out == leave_one_out
        assert score.accuracy == score.correct / score.images


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_searching_few_queries_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch, leave_one_out: bool) -> None:
    bank, queries = features(60, 4, seed=1), None if leave_one_out else features(41, 4, seed=2)
    whole = knn_scores(bank, queries, ks=[1, 7], temperatures=[0.1], device=CPU)
    for step in (1, 7, 40, 41):
        monkeypatch.setattr(module, "_MOST_QUERIES", step)
        assert knn_scores(bank, queries, ks=[1, 7], temperatures=[0.1], device=CPU) == whole


def test_a_training_image_does_not_vote_for_itself_but_its_copies_do() -> None:
    alone = Features(torch.eye(4), torch.tensor([0, 1, 2, 3]), torch.arange(4))
    assert knn_scores(alone, None, ks=[1], device=CPU)[0].correct == 0
    twice = Features(torch.cat([torch.eye(4)] * 2), torch.tensor([0, 1, 2, 3] * 2), torch.arange(8))
    assert knn_scores(twice, None, ks=[1], device=CPU)[0].correct == 8


def test_more_copies_than_k_may_hide_the_own_image() -> None:
    """The own row is not among the k + 1 lowest of 40 equal ones; k voters are left all the same."""
    bank = Features(torch.ones(40, 3), torch.tensor([0] * 10 + [1] * 30), torch.arange(40))
    score = knn_scores(bank, None, ks=[3], device=CPU)[0]
    assert (score.k, score.correct) == (3, 10)  # rows 0 to 3 vote on all, and they are of class 0


@pytest.mark.parametrize(("count", "leave_one_out", "voters"), [(5, False, 5), (5, True, 4), (1, False, 1)])
def test_k_beyond_the_voters_means_all_of_them(count: int, leave_one_out: bool, voters: int) -> None:
    bank = features(count, 2, seed=0)
    scores = knn_scores(bank, None if leave_one_out else features(9, 2, seed=1), ks=[200, 1, 1000, voters], device=CPU)
    assert [score.k for score in scores] == sorted({1, voters})


def test_one_image_alone_has_nobody_to_vote() -> None:
    with pytest.raises(UserError, match="1 labelled images are too few for kNN"):
        knn_scores(features(1, 1, seed=0), None, ks=[1], device=CPU)


def coloured(labels: list[int], seed: int, noise: int = 40) -> MemorySource:
    """Images of 8 px whose channel `label` is bright."""
    random = np.random.default_rng(seed)
    pixels = random.integers(noise, size=(len(labels), 3, 8, 8))
    for image, label in zip(pixels, labels, strict=True):
        image[max(label, 0)] += 150
    return MemorySource(torch.from_numpy(pixels.astype(np.uint8)), labels, ("red", "green", "blue"), title="coloured")


class Channels(nn.Module):
    """The mean of each channel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def score(train: MemorySource, test: MemorySource | None, **options: object) -> KnnScore:
    settings = {"config": CONFIG, "device": CPU, "k": 3} | options
    return evaluate_knn(Channels(), train, test, **settings)  # type: ignore[arg-type]


def test_from_images_to_accuracy() -> None:
    train, test = coloured([0, 1, 2] * 6, seed=0), coloured([0, 1, 2] * 3, seed=1)
    assert score(train, test) == KnnScore(k=3, temperature=None, correct=9, images=9, leave_one_out=False)
    assert score(train, None) == KnnScore(k=3, temperature=None, correct=18, images=18, leave_one_out=True)


def test_unlabelled_images_neither_vote_nor_count() -> None:
    train = coloured([0, 1, 2] * 6 + [-1] * 5, seed=0)
    assert score(train, coloured([0, 1, 2, -1, -1], seed=1)).images == 3
    assert score(train, None).images == 18
    assert score(train, coloured([-1, -1], seed=1)).leave_one_out
    with pytest.raises(UserError, match=r"no labels \(an image is coloured\[0\]\).*name labelled data"):
        score(coloured([-1, -1], seed=1), None)


def test_held_out_images_that_are_the_training_images_are_not_held_out(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    same = FolderData(path=tmp_path / "a", test_path=tmp_path / "a" / ".." / "a")
    assert not has_held_out(same)
    assert has_held_out(FolderData(path=tmp_path / "a", test_path=tmp_path / "b"))
    assert not has_held_out(FolderData(path=tmp_path / "a"))
    assert has_held_out(CONFIG.data)
    train = coloured([0, 1, 2] * 6, seed=0)
    assert score(train, train, config=CONFIG.model_copy(update={"data": same})).leave_one_out


def test_a_limit_takes_a_fixed_sample_of_each() -> None:
    train, test = coloured([0, 1, 2] * 20, seed=0, noise=200), coloured([0, 1, 2] * 9, seed=1, noise=200)
    first = score(train, test, limit=15)
    assert (first.images, score(train, test, limit=15)) == (15, first)
    ids = labelled_ids(train)
    chosen = sample(ids, 15, seed=0)
    assert len(chosen.unique()) == 15
    assert chosen.tolist() == sorted(chosen.tolist())
    assert chosen.tolist() == sample(ids, 15, seed=0).tolist() != sample(ids, 15, seed=1).tolist()
    assert set(sample(ids, 10, seed=0).tolist()) < set(chosen.tolist())
    assert sample(ids, 60, seed=0) is ids


def test_features_that_are_not_finite_are_refused() -> None:
    class Broken(Channels):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) / 0

    train = coloured([0, 1, 2] * 2, seed=0)
    with pytest.raises(UserError, match=r"of 6 of 6 images are not finite \(one is coloured\[0\]\)"):
        evaluate_knn(Broken(), train, None, config=CONFIG, device=CPU, k=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_a_gpu_finds_the_same(leave_one_out: bool) -> None:
    bank, queries = features(3000, 5, seed=1), None if leave_one_out else features(500, 5, seed=2)
    options = {"ks": [1, 20, 2500], "temperatures": [0.07]}
    expected = knn_scores(bank, queries, device=CPU, **options)  # type: ignore[arg-type]
    found = knn_scores(bank, queries, device=torch.device("cuda"), **options)  # type: ignore[arg-type]
    for one, other in zip(expected, found, strict=True):
        # normalising rounds differently there, which may swap neighbours that are equal to within float32
        assert abs(one.correct - other.correct) <= 2
