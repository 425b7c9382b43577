"""kNN accuracy of frozen features: exact search, any k, majority and weighted votes.

Shapes: N voting images, Q queries, K voters of each, F features, C classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_faiss.config import Config
from msf_faiss.data.source import Source
from msf_faiss.embeddings.extract import Features, extract
from msf_faiss.errors import UserError
from msf_faiss.evaluate.accuracy import mean_per_class
from msf_faiss.evaluate.images import has_held_out, is_labelled, labelled_ids, sample
from msf_faiss.search.knn import knn
from msf_faiss.search.neighbors import Neighbors

_MAX_ELEMENTS = 1 << 22  # of a [Q, C] or [Q, K] tensor
_MAX_QUERIES = 4096  # per search


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnScore:
    """How many images the vote of their nearest neighbours classifies correctly."""

    k: int  # voters: as requested, or all if there are fewer
    temperature: float | None  # of the weighted vote; None: majority vote
    correct: int
    images: int
    mean_per_class: float  # 0..1, over the classes of the classified images
    leave_one_out: bool  # the training images classify each other

    @property
    def accuracy(self) -> float:
        """0..1."""
        return self.correct / self.images


def evaluate_knn(
    encoder: nn.Module,
    train: Source,
    test: Source | None,
    *,
    config: Config,
    device: torch.device,
    k: int,
    limit: int | None = None,
    batch_size: int = 256,
) -> KnnScore:
    """Majority-vote kNN accuracy of `encoder` ([B, 3, S, S] on `device` to [B, F]), as monitored during training.

    Leave-one-out over the training images if there are no labelled held-out images (`test` is None or unlabelled, or
    the config names the training data twice). Unlabelled images are left out. `limit` caps the images of each set, by
    a sample that depends only on the config's seed.

    Raises:
        UserError: if there are no labels, fewer than two images, unreadable images, or features that are not finite.
    """
    held_out = test if test is not None and has_held_out(config.data) and is_labelled(test) else None

    def features(source: Source) -> Features:
        ids = sample(labelled_ids(source), limit, seed=config.seed)
        return extract(encoder, source, ids=ids, config=config, device=device, batch_size=batch_size)

    queries = None if held_out is None else features(held_out)
    return knn_scores(features(train), queries, ks=[k], device=device)[0]


def knn_scores(
    train: Features,
    test: Features | None,
    *,
    ks: Sequence[int],
    temperatures: Sequence[float] = (),
    device: torch.device,
) -> list[KnnScore]:
    """Accuracies of the majority vote, and of the weighted vote at each temperature, for each k.

    Features are L2-normalised and searched exactly, once for all k; among equally similar images the lower row ranks
    first. A k larger than the number of possible voters means all of them. For k = 1 all votes are the same, so only
    the majority vote is returned.

    Args:
        train: features of labelled images, which vote; all labels >= 0.
        test: features of labelled images to classify; None: leave-one-out, training images classify each other.
        ks: numbers of voters, >= 1.
        temperatures: of the weighted votes, > 0.
        device: where to search.

    Raises:
        UserError: if there are no voters.
    """
    assert train.labels is not None
    leave_one_out = test is None
    judged = train if test is None else test
    assert judged.labels is not None
    voters = len(train.ids) - leave_one_out
    if voters < 1:
        raise UserError(f"kNN needs at least two labelled images, found {len(train.ids)}")
    unique_ks, weighted = sorted({min(k, voters) for k in ks}), sorted(set(temperatures))
    classes = int(max(train.labels.max(), judged.labels.max())) + 1
    votes = [(k, temperature) for k in unique_ks for temperature in (None, *(weighted if k > 1 else ()))]
    guesses: dict[tuple[int, float | None], list[Tensor]] = {vote: [] for vote in votes}
    for similarities, voter_rows in _search(train, test, unique_ks[-1], classes, device):
        labels = train.labels[voter_rows]  # [q, K]
        for k, temperature in votes:
            nearest = labels[:, :k], similarities[:, :k], classes
            winners = majority_vote(*nearest) if temperature is None else weighted_vote(*nearest, temperature)
            guesses[k, temperature].append(winners)
    truth, scores = judged.labels.numpy(), []
    for (k, temperature), parts in guesses.items():
        guessed = torch.cat(parts).numpy()  # [Q]
        scores.append(
            KnnScore(
                k=k,
                temperature=temperature,
                correct=int((guessed == truth).sum()),
                images=len(truth),
                mean_per_class=mean_per_class(guessed, truth),
                leave_one_out=leave_one_out,
            )
        )
    return scores


def majority_vote(labels: Tensor, similarities: Tensor, classes: int) -> Tensor:
    """The class with the most voters, as in MSF (section 4): [Q] int64.

    Ties go to the class with the larger sum of similarities, then to the class of the highest-ranked voter.

    Args:
        labels: [Q, K] int64, class of each voter, nearest first.
        similarities: [Q, K] float32, descending.
        classes: C, larger than every label.
    """
    return _elect(labels, [torch.ones_like(similarities, dtype=torch.float64), similarities.double()], classes)


def weighted_vote(labels: Tensor, similarities: Tensor, classes: int, temperature: float) -> Tensor:
    """The class with the largest sum of exp(similarity / temperature) over its voters: [Q] int64.

    Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (2018), section 3.4; usual
    temperatures are 0.07 and 0.1. Ties go to the class of the highest-ranked voter. Arguments as in `majority_vote`.
    """
    scaled = similarities.double() / temperature
    return _elect(labels, [(scaled - scaled[:, :1]).exp()], classes)  # shifted against overflow; same winner


def _elect(labels: Tensor, ballots: list[Tensor], classes: int) -> Tensor:
    """Class with the largest sum of the first ballot [Q, K]; ties by the next ballot, then by the best rank."""
    leading = torch.ones(labels.shape[0], classes, dtype=torch.bool, device=labels.device)  # [Q, C]
    for ballot in ballots:
        sums = torch.zeros(labels.shape[0], classes, dtype=ballot.dtype, device=labels.device)
        sums.scatter_add_(1, labels, ballot)
        sums.masked_fill_(~leading, -torch.inf)
        leading &= sums == sums.amax(dim=1, keepdim=True)
    first = leading.gather(1, labels).int().argmax(dim=1, keepdim=True)  # [Q, 1] rank of the best leading voter
    return labels.gather(1, first).squeeze(1)


def _search(
    train: Features, test: Features | None, k: int, classes: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """For chunks of queries, in order: similarities [q, k] and training rows [q, k] of the voters, on the CPU."""
    base = F.normalize(train.embeddings.to(device), dim=1)  # [N, F]
    queries = base if test is None else F.normalize(test.embeddings.to(device), dim=1)  # [Q, F]
    step = max(1, min(_MAX_QUERIES, _MAX_ELEMENTS // max(classes, k)))
    for start in range(0, len(queries), step):
        neighbors = knn(queries[start : start + step], base, k + (test is None))
        if test is None:
            neighbors = _drop_self(neighbors, start)
        yield neighbors.similarities.cpu(), neighbors.slots.cpu()


def _drop_self(neighbors: Neighbors, start: int) -> Neighbors:
    """Drop row start + i from the neighbours of query i; if more than k duplicates hide it, drop the last one."""
    count, columns = neighbors.slots.shape
    own = neighbors.slots == torch.arange(start, start + count, device=neighbors.slots.device).unsqueeze(1)  # [q, k+1]
    own[:, -1] |= ~own.any(dim=1)
    return Neighbors(*(values[~own].view(count, columns - 1) for values in neighbors))
