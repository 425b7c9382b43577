"""Accuracy of nearest neighbours among frozen features: exact search, any k, two ways to vote.

Shapes: N images of the bank, Q queries, K voters, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_faiss.config import Config
from msf_faiss.data.source import Source
from msf_faiss.embeddings.extract import Features
from msf_faiss.errors import UserError
from msf_faiss.evaluate.inputs import finite_features, has_held_out, is_labelled, labelled_ids, sample
from msf_faiss.evaluate.vote import majority_vote, weighted_vote
from msf_faiss.search.knn import knn
from msf_faiss.search.neighbors import Neighbors

_SCRATCH = 1 << 22  # elements of a [Q, C] or [Q, K] tensor held at a time
_MOST_QUERIES = 4096  # searched at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnScore:
    """How often the vote of the nearest neighbours was right."""

    k: int  # voters: what was asked for, or as many as there are
    temperature: float | None  # of the similarity-weighted vote; None: plain majority
    correct: int
    images: int
    leave_one_out: bool  # among the training images, each without itself

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
    """Majority-vote accuracy of `encoder` ([B, 3, S, S] on `device` to [B, F]), as monitored in training.

    Without labelled held-out images (`test` None or unlabelled, or the config names the training data twice) each
    training image is classified by the others. Images without a label are left out. At most `limit` images of each set
    are used, a sample that the config's seed determines.

    Raises:
        UserError: if there are no labels, fewer than two images, unreadable ones, or features that are not finite.
    """
    held_out = test if test is not None and has_held_out(config.data) and is_labelled(test) else None

    def features(source: Source) -> Features:
        ids = sample(labelled_ids(source), limit, seed=config.seed)
        return finite_features(encoder, source, ids, config=config, device=device, batch_size=batch_size)

    queries = None if held_out is None else features(held_out)
    return knn_scores(features(train), queries, ks=[k], device=device)[0]


def knn_scores(
    bank: Features,
    queries: Features | None,
    *,
    ks: Sequence[int],
    temperatures: Sequence[float] = (),
    device: torch.device,
) -> list[KnnScore]:
    """Accuracies of the majority vote and of a weighted vote at each temperature, for each k.

    Features are L2-normalised and searched exactly, once for all k; of images equally similar to a query, the one with
    the lower row ranks first. A k beyond the number of possible voters means all of them. For k = 1 all votes are the
    same, and only the majority's is returned.

    Args:
        bank: finite features of labelled images, which vote; those labelled -1 must have been left out.
        queries: labelled images to classify. None: those of the bank, each by the others (duplicates included).
        ks: numbers of voters, >= 1.
        temperatures: of the weighted votes, > 0.
        device: where to search.

    Raises:
        UserError: if there is nobody to vote.
    """
    assert bank.labels is not None
    leave_one_out = queries is None
    asked = bank if queries is None else queries
    assert asked.labels is not None
    voters = len(bank.ids) - leave_one_out
    if voters < 1:
        raise UserError(f"{len(bank.ids)} labelled images are too few for kNN, which needs at least two")
    every_k, weighted = sorted({min(k, voters) for k in ks}), sorted(set(temperatures))
    classes = int(max(bank.labels.max(), asked.labels.max())) + 1
    votes = [(k, temperature) for k in every_k for temperature in (None, *(weighted if k > 1 else ()))]
    correct = dict.fromkeys(votes, 0)
    for part, similarities, rows in _voters(bank, queries, every_k[-1], classes, device):
        labels = bank.labels[rows]  # [q, K]
        for k, temperature in votes:
            few = labels[:, :k], similarities[:, :k], classes
            elected = majority_vote(*few) if temperature is None else weighted_vote(*few, temperature)
            correct[k, temperature] += int((elected == asked.labels[part]).sum())
    return [
        KnnScore(
            k=k,
            temperature=temperature,
            correct=correct[k, temperature],
            images=len(asked.ids),
            leave_one_out=leave_one_out,
        )
        for k, temperature in votes
    ]


def _voters(
    bank: Features, queries: Features | None, k: int, classes: int, device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For some queries at a time: which, and similarities [q, k] and bank rows [q, k] of their voters, on the CPU."""
    base = F.normalize(bank.embeddings.to(device), dim=1)  # [N, F]
    wanted = base if queries is None else F.normalize(queries.embeddings.to(device), dim=1)  # [Q, F]
    step = max(1, min(_MOST_QUERIES, _SCRATCH // max(classes, k)))
    for start in range(0, len(wanted), step):
        part = slice(start, start + step)
        found = knn(wanted[part], base, k + (queries is None))
        if queries is None:
            found = _without_own(found, start)
        yield part, found.similarities.cpu(), found.slots.cpu()


def _without_own(found: Neighbors, start: int) -> Neighbors:
    """Drop each query's own row; query i is row start + i. Where more duplicates than k hide it, drop the last."""
    count, found_k = found.slots.shape
    own = found.slots == torch.arange(start, start + count, device=found.slots.device).unsqueeze(1)  # [q, k + 1]
    own[:, -1] |= ~own.any(dim=1)
    return Neighbors(*(values[~own].view(count, found_k - 1) for values in found))
