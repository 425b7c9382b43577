import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msf_faiss.config import Config, FolderData, ViewsConfig
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.embeddings.extract import Features
from msf_faiss.errors import UserError
from msf_faiss.evaluate import knn as knn_module
from msf_faiss.evaluate.images import has_held_out, labelled_ids, sample
from msf_faiss.evaluate.knn import KnnScore, evaluate_knn, knn_scores, majority_vote, weighted_vote

CPU = torch.device("cpu")
CONFIG = Config(views=ViewsConfig(size=8, mean=(0, 0, 0), std=(1, 1, 1)))


def features(count: int, classes: int, seed: int, dim: int = 6) -> Features:
    """Loose clusters, one per class."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=count)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    points = centres[labels] + random.normal(size=(count, dim))
    return Features(torch.from_numpy(points).float(), torch.from_numpy(labels), torch.arange(count) * 3)


def slow_scores(bank: Features, queries: Features | None, k: int, temperature: float | None) -> tuple[int, int]:
    """Numbers of correct and of all queries, one query at a time in float64."""
    assert bank.labels is not None
    judged = bank if queries is None else queries
    assert judged.labels is not None
    base = nn.functional.normalize(bank.embeddings, dim=1).double()
    correct = 0
    for row, (embedding, label) in enumerate(zip(judged.embeddings, judged.labels.tolist(), strict=True)):
        similarities = base @ nn.functional.normalize(embedding, dim=0).double()
        others = [i for i in range(len(base)) if queries is not None or i != row]
        nearest = sorted(others, key=lambda i: (-float(similarities[i].float()), i))[:k]
        votes = bank.labels[nearest][None], similarities[nearest].float()[None], 100
        winner = majority_vote(*votes) if temperature is None else weighted_vote(*votes, temperature)
        correct += int(winner) == label
    return correct, len(judged.ids)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_scores_equal_dense_search(leave_one_out: bool) -> None:
    bank = features(70, 4, seed=1)
    queries = None if leave_one_out else features(50, 5, seed=2)  # a class without voters is never correct
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
def test_chunk_size_does_not_change_scores(monkeypatch: pytest.MonkeyPatch, leave_one_out: bool) -> None:
    bank, queries = features(60, 4, seed=1), None if leave_one_out else features(41, 4, seed=2)
    whole = knn_scores(bank, queries, ks=[1, 7], temperatures=[0.1], device=CPU)
    for step in (1, 7, 40, 41):
        monkeypatch.setattr(knn_module, "_MAX_QUERIES", step)
        assert knn_scores(bank, queries, ks=[1, 7], temperatures=[0.1], device=CPU) == whole


def test_leave_one_out_drops_the_image_but_not_its_duplicates() -> None:
    alone = Features(torch.eye(4), torch.tensor([0, 1, 2, 3]), torch.arange(4))
    assert knn_scores(alone, None, ks=[1], device=CPU)[0].correct == 0
    twice = Features(torch.cat([torch.eye(4)] * 2), torch.tensor([0, 1, 2, 3] * 2), torch.arange(8))
    assert knn_scores(twice, None, ks=[1], device=CPU)[0].correct == 8


def test_leave_one_out_with_more_duplicates_than_k() -> None:
    """The image itself is not among the k + 1 lowest of 40 equal rows; still k voters are left."""
    bank = Features(torch.ones(40, 3), torch.tensor([0] * 10 + [1] * 30), torch.arange(40))
    score = knn_scores(bank, None, ks=[3], device=CPU)[0]
    assert (score.k, score.correct) == (3, 10)  # rows 0 to 3, of class 0, vote on all


@pytest.mark.parametrize(("count", "leave_one_out", "voters"), [(5, False, 5), (5, True, 4), (1, False, 1)])
def test_k_is_clamped_to_the_number_of_voters(count: int, leave_one_out: bool, voters: int) -> None:
    bank = features(count, 2, seed=0)
    scores = knn_scores(bank, None if leave_one_out else features(9, 2, seed=1), ks=[200, 1, 1000, voters], device=CPU)
    assert [score.k for score in scores] == sorted({1, voters})


def test_one_image_is_too_few() -> None:
    with pytest.raises(UserError, match="at least two labelled images, found 1"):
        knn_scores(features(1, 1, seed=0), None, ks=[1], device=CPU)


def coloured(labels: list[int], seed: int, noise: int = 40) -> MemorySource:
    """8 px images whose channel `label` is bright."""
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


def test_evaluate_knn_with_and_without_held_out_images() -> None:
    train, test = coloured([0, 1, 2] * 6, seed=0), coloured([0, 1, 2] * 3, seed=1)
    assert score(train, test) == KnnScore(
        k=3, temperature=None, correct=9, images=9, mean_per_class=1.0, leave_one_out=False
    )
    assert score(train, None) == KnnScore(
        k=3, temperature=None, correct=18, images=18, mean_per_class=1.0, leave_one_out=True
    )


def test_unlabelled_images_are_left_out() -> None:
    train = coloured([0, 1, 2] * 6 + [-1] * 5, seed=0)
    assert score(train, coloured([0, 1, 2, -1, -1], seed=1)).images == 3
    assert score(train, None).images == 18
    assert score(train, coloured([-1, -1], seed=1)).leave_one_out
    with pytest.raises(UserError, match=r"no labels \(for example coloured\[0\]\).*use labelled data"):
        score(coloured([-1, -1], seed=1), None)


def test_training_images_named_twice_are_not_held_out(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    same = FolderData(path=tmp_path / "a", test_path=tmp_path / "a" / ".." / "a")
    assert not has_held_out(same)
    assert has_held_out(FolderData(path=tmp_path / "a", test_path=tmp_path / "b"))
    assert not has_held_out(FolderData(path=tmp_path / "a"))
    assert has_held_out(CONFIG.data)
    train = coloured([0, 1, 2] * 6, seed=0)
    assert score(train, train, config=CONFIG.model_copy(update={"data": same})).leave_one_out


def test_limit_takes_a_fixed_sample() -> None:
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
    with pytest.raises(UserError, match=r"the embedding of coloured\[0\] is not finite"):
        evaluate_knn(Broken(), train, None, config=CONFIG, device=CPU, k=1)


# Votes


def slow_majority(labels: list[int], similarities: list[float]) -> int:
    count: dict[int, int] = defaultdict(int)
    total: dict[int, float] = defaultdict(float)
    for label, similarity in zip(labels, similarities, strict=True):
        count[label] += 1
        total[label] += similarity
    return max(count, key=lambda label: (count[label], total[label], -labels.index(label)))


def slow_weighted(labels: list[int], similarities: list[float], temperature: float) -> int:
    total: dict[int, float] = defaultdict(float)
    for label, similarity in zip(labels, similarities, strict=True):
        total[label] += math.exp(similarity / temperature)
    return max(total, key=lambda label: (total[label], -labels.index(label)))


def voters(queries: int, k: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random voters; similarities are multiples of 1/8, so that sums often tie exactly."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (queries, k), generator=generator)
    eighths = torch.randint(-8, 9, (queries, k), generator=generator)
    return labels, (eighths.float() / 8).sort(dim=1, descending=True).values


@pytest.mark.parametrize(("k", "classes"), [(1, 3), (2, 2), (4, 3), (7, 10), (30, 5)])
def test_majority_vote_equals_counting(k: int, classes: int) -> None:
    labels, similarities = voters(300, k, classes, seed=k)
    expected = [slow_majority(*pair) for pair in zip(labels.tolist(), similarities.tolist(), strict=True)]
    assert majority_vote(labels, similarities, classes).tolist() == expected


@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_weighted_vote_equals_sum_of_exponentials(temperature: float) -> None:
    labels, _ = voters(300, 9, 4, seed=0)
    similarities = torch.rand(300, 9, generator=torch.Generator().manual_seed(1)).sort(dim=1, descending=True).values
    expected = [slow_weighted(*pair, temperature) for pair in zip(labels.tolist(), similarities.tolist(), strict=True)]
    assert weighted_vote(labels, similarities, 4, temperature).tolist() == expected


def test_ties_go_to_larger_similarity_then_to_better_rank() -> None:
    labels = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [2, 1, 1, 2]])
    similarities = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.65], [0.5, 0.5, 0.5, 0.5]])
    assert majority_vote(labels, similarities, 3).tolist() == [1, 0, 2]
    assert weighted_vote(labels[2:], similarities[2:], 3, 0.1).tolist() == [2]


def test_extreme_temperatures_do_not_overflow() -> None:
    labels, similarities = torch.tensor([[1, 0, 0]]), torch.tensor([[1.0, 0.99, 0.99]])
    assert weighted_vote(labels, similarities, 2, 1e-6).tolist() == [1]
    assert weighted_vote(labels, similarities, 2, 100.0).tolist() == [0]


def test_votes_without_queries() -> None:
    labels, similarities = torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3)
    assert majority_vote(labels, similarities, 2).shape == (0,)
    assert weighted_vote(labels, similarities, 2, 0.1).shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_gpu_gives_the_same_scores(leave_one_out: bool) -> None:
    bank, queries = features(3000, 5, seed=1), None if leave_one_out else features(500, 5, seed=2)
    options = {"ks": [1, 20, 2500], "temperatures": [0.07]}
    expected = knn_scores(bank, queries, device=CPU, **options)  # type: ignore[arg-type]
    on_gpu = knn_scores(bank, queries, device=torch.device("cuda"), **options)  # type: ignore[arg-type]
    for one, other in zip(expected, on_gpu, strict=True):
        # normalising rounds differently on a GPU, which may swap neighbours that are equal within float32
        assert abs(one.correct - other.correct) <= 2
