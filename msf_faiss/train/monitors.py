"""What a run watches while it trains. Labels are read here and nowhere else in training.

Shapes: B queries, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.errors import UserError

_SAMPLED = 64  # queries a step of which every neighbour is remembered until the next reading
_HUBS = 10
_LEAST_STD, _LEAST_RANK = 0.1, 2.0  # of embeddings that have not collapsed
_LOW_IN_A_ROW = 3


def _alone(tensor: Tensor) -> Tensor:
    """The sum over one rank."""
    return tensor


class NeighborReading(NamedTuple):
    """What the neighbours since the last reading were like, without entries of the query's own image."""

    purity: float | None  # share with the query's label; None: no pair could be compared
    age: float  # mean, in entries pushed since
    age_p95: float  # 95 % are not older
    hubness: float  # share of the queries that find one of the ten most found entries, mean of the ten


class NeighborMonitor:
    """Purity and age of the neighbours, and hubs among them, without entries of the query's own image.

    The authors count a query's own entry too, which gives their purity a floor of 1/k. A bank larger than the data set
    holds an image several times; all of these entries are left out, since their label is right by construction.

    Means are over all queries; the 95th percentile and the hubs are those of the first 64 queries of each step, which
    are as random a part of it as any.

    Args:
        labels: [images] int64, -1 for an image without a label; None for an unlabelled data set.
        device: where ids and ages will be.
        total: sums a tensor over the ranks, each of which counts its own queries; all of them read together then, and
            percentile and hubs are those of each rank's own.
    """

    def __init__(
        self, labels: NDArray[np.int64] | None, device: torch.device, total: Callable[[Tensor], Tensor] = _alone
    ) -> None:
        self._total = total
        self._labels = None if labels is None else torch.from_numpy(labels).to(device)
        self._zero = torch.zeros(4, dtype=torch.float64, device=device)
        self._sums = self._zero.clone()  # matches, labelled pairs, ages, pairs
        self._sampled: list[Tensor] = []  # [3, Q, K] int64 each: entry by its number, age, whether of another image

    def update(self, ids: Tensor, neighbor_ids: Tensor, ages: Tensor, pushed: int) -> None:
        """Count one batch. Does not wait for the device.

        Args:
            ids: of the queries' images, [B].
            neighbor_ids: of the neighbours' images, [B, K].
            ages: of the neighbours, [B, K].
            pushed: entries that the bank was ever given, which makes an age the number of an entry.
        """
        others = neighbor_ids != ids.unsqueeze(1)  # [B, K]
        if self._labels is None:
            matches = labelled = torch.zeros_like(others)
        else:
            own, theirs = self._labels[ids].unsqueeze(1), self._labels[neighbor_ids]
            labelled = others & (own >= 0) & (theirs >= 0)
            matches = labelled & (own == theirs)
        self._sums += torch.stack([matches.sum(), labelled.sum(), (ages * others).sum(), others.sum()])
        some = ages[:_SAMPLED]
        self._sampled.append(torch.stack([pushed - 1 - some, some, others[:_SAMPLED].long()]))

    @property
    def pending(self) -> dict[str, Tensor]:
        """What was counted since the last reading, on all ranks. A resumed run goes on from it."""
        sampled = {f"sampled.{number}": tensor for number, tensor in enumerate(self._sampled)}
        return {"sums": self._total(self._sums), **sampled}

    @pending.setter
    def pending(self, counted: Mapping[str, Tensor]) -> None:
        device = self._zero.device
        self._sums = counted["sums"].to(device)
        self._sampled = [counted[f"sampled.{number}"].to(device) for number in range(len(counted) - 1)]

    def read(self) -> NeighborReading:
        """The reading, after which counting begins anew."""
        matches, labelled, ages, pairs = self._total(self._sums).tolist()
        queries = sum(tensor.shape[1] for tensor in self._sampled)
        flat = [tensor.flatten(1) for tensor in self._sampled]
        sampled = torch.cat(flat, dim=1).cpu().numpy() if flat else np.empty((3, 0), np.int64)
        self._sums, self._sampled = self._zero.clone(), []
        numbers, known_ages = sampled[:2, sampled[2] == 1]
        found = np.sort(np.unique(numbers, return_counts=True)[1])[-_HUBS:]
        return NeighborReading(
            purity=matches / labelled if labelled else None,
            age=ages / pairs if pairs else 0.0,
            age_p95=float(np.quantile(known_ages, 0.95, method="higher")) if known_ages.size else 0.0,
            hubness=float(found.mean()) / queries if found.size else 0.0,
        )


class LossMonitor:
    """Losses of the steps since the last reading, kept on the device until then.

    Args:
        total: sums a tensor over the ranks, each of which is given its share of every loss; all of them read together.
    """

    def __init__(self, total: Callable[[Tensor], Tensor] = _alone) -> None:
        self._total = total
        self._losses: list[Tensor] = []

    def update(self, loss: Tensor) -> None:
        self._losses.append(loss)

    @property
    def pending(self) -> Tensor:
        """The losses since the last reading, over all ranks: [n]. A resumed run goes on from them."""
        return self._total(torch.stack(self._losses)) if self._losses else torch.empty(0)

    @pending.setter
    def pending(self, losses: Tensor) -> None:
        self._losses = list(losses)

    def check(self, step: int) -> list[float]:
        """The losses since the last reading, up to and with step number `step`.

        Raises:
            UserError: if one is not finite; names the first such step.
        """
        losses: list[float] = self.pending.tolist()
        for number, loss in enumerate(losses, start=step - len(losses) + 1):
            if not np.isfinite(loss):
                raise UserError(
                    f"the loss of step {number} is {loss}: training has diverged; "
                    "lower optimizer.learning_rate, or add optimizer.warmup_epochs"
                )
        return losses

    def read(self, step: int) -> float:
        """Mean loss since the last reading, checked like that."""
        losses = self.check(step)
        self._losses.clear()
        return float(np.mean(losses))


class Spread(NamedTuple):
    """How far embeddings are from all being the same."""

    std: float  # mean standard deviation of a dimension, times sqrt(D): 1 if evenly on the sphere, 0 if all are equal
    rank: float  # exp of the entropy of the normalised singular values: 1 if all lie on a line, at most min(M, D)


def spread_of(embeddings: Tensor) -> Spread:
    """Spread of unit vectors [M, D], M >= 1, computed on the CPU, which waits for the device.

    The deviation is SimSiam's sign of collapse (CVPR 2021, section 4.1), the rank RankMe's (ICML 2023), after Roy and
    Vetterli (2007).
    """
    vectors = embeddings.double().cpu()
    deviation = vectors.std(dim=0, correction=0).mean() * vectors.shape[1] ** 0.5
    gram = vectors @ vectors.T if len(vectors) <= vectors.shape[1] else vectors.T @ vectors
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = singular / singular.sum().clamp_min(1e-12)
    return Spread(float(deviation), float(torch.special.entr(shares).sum().exp()))


class CollapseWatch:
    """Says once when embeddings have come to lie close together, and since which step.

    A low reading may be chance, as in a bank with a few entries: three in a row are not.
    """

    def __init__(self) -> None:
        self._since, self._low = -1, 0  # step of the first of the low readings in a row, and their number

    @property
    def since(self) -> int | None:
        """Where the collapse began; None: there is none."""
        return self._since if self._low >= _LOW_IN_A_ROW else None

    @property
    def pending(self) -> Tensor:
        """What the next reading builds on: [2] int64. A resumed run goes on from it."""
        return torch.tensor([self._since, self._low])

    @pending.setter
    def pending(self, counters: Tensor) -> None:
        self._since, self._low = counters.tolist()

    def update(self, spread: Spread, step: int) -> bool:
        """Take in the reading of a step; true if the collapse is certain now and was not before."""
        if spread.std >= _LEAST_STD and spread.rank >= _LEAST_RANK:
            self._since, self._low = -1, 0
            return False
        if self._low == 0:
            self._since = step
        self._low += 1
        return self._low == _LOW_IN_A_ROW
