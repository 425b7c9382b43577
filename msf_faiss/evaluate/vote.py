"""Votes of neighbours on the class of a query.

Shapes: Q queries, K voters of each, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def majority_vote(labels: Tensor, similarities: Tensor, classes: int) -> Tensor:
    """The class with the most voters, as in the paper: [Q] int64.

    Of classes with equally many voters, the one whose voters' similarities sum to more wins; of those, the one whose
    best voter ranks first.

    Args:
        labels: [Q, K] int64 class of each voter, the nearest first.
        similarities: [Q, K] float32, falling.
        classes: C, larger than every label.
    """
    return _elect(labels, [torch.ones_like(similarities, dtype=torch.float64), similarities.double()], classes)


def weighted_vote(labels: Tensor, similarities: Tensor, classes: int, temperature: float) -> Tensor:
    """The class whose voters have the largest sum of exp(similarity / temperature): [Q] int64.

    The vote of Wu et al. (2018, "Unsupervised feature learning via non-parametric instance discrimination", section
    3.4), usual since with temperatures of 0.07 and 0.1. Of equal classes, the one whose best voter ranks first wins.
    Arguments as in `majority_vote`; `temperature` > 0.
    """
    scaled = similarities.double() / temperature
    return _elect(labels, [(scaled - scaled[:, :1]).exp()], classes)  # the same winner, and nothing overflows


def _elect(labels: Tensor, ballots: list[Tensor], classes: int) -> Tensor:
    """The class with the largest sum of the first ballot [Q, K]; ties by the next one, at last by the best rank."""
    leading = torch.ones(labels.shape[0], classes, dtype=torch.bool, device=labels.device)  # [Q, C]
    for ballot in ballots:
        sums = torch.zeros(labels.shape[0], classes, dtype=ballot.dtype, device=labels.device)
        sums.scatter_add_(1, labels, ballot)
        sums.masked_fill_(~leading, -torch.inf)
        leading &= sums == sums.amax(dim=1, keepdim=True)
    first = leading.gather(1, labels).int().argmax(dim=1, keepdim=True)  # [Q, 1] rank of the best leading voter
    return labels.gather(1, first).squeeze(1)
