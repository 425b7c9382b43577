"""What a run measures while it trains. Labels are used here and nowhere else in training.

Shapes: B queries, K neighbours.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.bank.recall_monitor import RecallMonitor
from msf_faiss.config import Config, IvfBankConfig, ScanBankConfig
from msf_faiss.data.source import Source
from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.errors import UserError

_SAMPLED = 64  # queries per step whose neighbours are kept for percentile and hubness
_HUBS = 10
_MIN_STD, _MIN_RANK = 0.1, 2.0  # below either, embeddings are collapsing
_LOW_IN_A_ROW = 3


class Monitors:
    """The monitors of a run. A checkpoint saves them, so a resumed run reports the same metrics.

    `device` is that of the bank. All ranks summarize and save together.
    """

    def __init__(self, config: Config, source: Source, device: torch.device, ranks: Ranks) -> None:
        self._ranks = ranks
        self.labelled = source.labels is not None and bool((source.labels >= 0).any())
        self.neighbors = NeighborMonitor(source.labels if self.labelled else None, device, ranks)
        self.loss, self.collapse, self.knn = LossMonitor(ranks), CollapseMonitor(), KnnMonitor(config.knn.k)
        self.recall: RecallMonitor | None = None
        if isinstance(config.bank, ScanBankConfig | IvfBankConfig):
            check, least = config.bank.recall_check, config.bank.min_recall
            self.recall = RecallMonitor(
                every_steps=check.every_steps, queries=check.queries, min_recall=least, total=ranks.sum
            )
        self.unreadable: dict[int, str] = {}  # defects of the images that this rank has skipped, by id

    def state_dict(self) -> dict[str, Tensor]:
        """The states of all monitors, summed over the ranks."""
        skipped = sorted(set().union(*self._ranks.gather_objects(set(self.unreadable))))
        states = {
            "neighbors": self.neighbors.state_dict(),
            "loss": self.loss.state_dict(),
            "collapse": self.collapse.state_dict(),
            "knn": self.knn.state_dict(),
            "recall": self.recall.state_dict() if self.recall else {},
            "unreadable": {"ids": torch.tensor(skipped, dtype=torch.int64)},
        }
        return {f"{monitor}.{name}": tensor for monitor, state in states.items() for name, tensor in state.items()}

    def load_state_dict(
        self, tensors: Mapping[str, Tensor], *, bank_changed: bool = False, knn_changed: bool = False
    ) -> None:
        """Continue from `state_dict`, of any number of ranks.

        Forget the recall if `bank_changed`, and the kNN accuracies if other images or neighbours are evaluated now.
        """
        states: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            monitor, _, key = name.partition(".")
            states.setdefault(monitor, {})[key] = tensor
        self.neighbors.load_state_dict(states["neighbors"])
        self.loss.load_state_dict(states["loss"])
        self.collapse.load_state_dict(states["collapse"])
        if "knn" in states and not knn_changed:  # older checkpoints have none
            self.knn.load_state_dict(states["knn"])
        if self.recall is not None and not bank_changed:
            self.recall.load_state_dict(states["recall"])
        if self._ranks.is_main:
            skipped = states["unreadable"]["ids"].tolist()
            self.unreadable = {index: f"image {index}, skipped earlier" for index in skipped}


class _NeighborStats(NamedTuple):
    """Statistics of neighbours, without entries of the query's own image."""

    purity: float | None  # ratio of neighbours with the query's label; None: no labelled pair
    age_mean: float  # entries pushed since the neighbour was
    age_p95: float
    hubness: float  # ratio of queries that retrieve an entry, mean of the ten most retrieved entries


class NeighborMonitor:
    """Purity, age and hubness of the neighbours, without entries of the query's own image.

    The authors count a query's own entry, which gives their purity a floor of 1/k. A bank larger than the data set
    contains an image several times; all of its entries are excluded, since their label is correct by construction.

    Purity and mean age cover all queries. The 95th percentile and hubness cover the first 64 queries of each step, a
    random sample like any other, on this rank only.

    Args:
        labels: [images] int64, -1 for an image without a label; None for an unlabelled data set.
        device: of ids and ages.
        ranks: None: this process alone.
    """

    def __init__(self, labels: NDArray[np.int64] | None, device: torch.device, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._labels = None if labels is None else torch.from_numpy(labels).to(device)
        self._zero = torch.zeros(4, dtype=torch.float64, device=device)
        self._sums = self._zero.clone()  # pairs with equal labels, labelled pairs, ages, pairs
        self._sampled: list[Tensor] = []  # [3, Q, K] int64 each: entry number, age, whether from another image

    def update(self, ids: Tensor, neighbor_ids: Tensor, ages: Tensor, pushed: int) -> None:
        """Count one batch. Does not wait for the device.

        Args:
            ids: of the queries' images, [B].
            neighbor_ids: of the neighbours' images, [B, K].
            ages: of the neighbours, [B, K].
            pushed: entries ever pushed into the bank; with an age it identifies an entry.
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

    def summarize(self) -> _NeighborStats:
        """Statistics since the last call; starts over."""
        matches, labelled, ages, pairs = self._ranks.sum(self._sums).tolist()
        queries = sum(tensor.shape[1] for tensor in self._sampled)
        flat = [tensor.flatten(1) for tensor in self._sampled]
        sampled = torch.cat(flat, dim=1).cpu().numpy() if flat else np.empty((3, 0), np.int64)
        self._sums, self._sampled = self._zero.clone(), []
        numbers, known_ages = sampled[:2, sampled[2] == 1]
        hubs = np.sort(np.unique(numbers, return_counts=True)[1])[-_HUBS:]
        return _NeighborStats(
            purity=matches / labelled if labelled else None,
            age_mean=ages / pairs if pairs else 0.0,
            age_p95=float(np.quantile(known_ages, 0.95, method="higher")) if known_ages.size else 0.0,
            hubness=float(hubs.mean()) / queries if hubs.size else 0.0,
        )

    def state_dict(self) -> dict[str, Tensor]:
        sampled = {f"sampled.{number}": tensor for number, tensor in enumerate(self._sampled)}
        return {"sums": self._ranks.sum(self._sums), **sampled}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`; the counts of all ranks continue on rank 0."""
        state = {name: _on_main_only(tensor, self._ranks).to(self._zero.device) for name, tensor in state.items()}
        self._sums = state["sums"]
        self._sampled = [state[f"sampled.{number}"] for number in range(len(state) - 1)]


def diverged(sign: str) -> UserError:
    """The error that ends a run, with the sign that its numbers are no longer finite."""
    return UserError(f"{sign}: training has diverged. Lower optimizer.learning_rate, or add optimizer.warmup_epochs")


class LossMonitor:
    """Losses of the steps since the last `mean`, kept on the device until then. Each rank adds its weighted loss."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._losses: list[Tensor] = []

    def update(self, loss: Tensor) -> None:
        self._losses.append(loss)

    def check(self, step: int) -> list[float]:
        """The losses since the last `mean`, up to step number `step`.

        Raises:
            UserError: if one is not finite; names the first such step.
        """
        losses: list[float] = self.state_dict()["losses"].tolist()
        for number, loss in enumerate(losses, start=step - len(losses) + 1):
            if not np.isfinite(loss):
                raise diverged(f"the loss of step {number} is {loss}")
        return losses

    def mean(self, step: int) -> float:
        """Mean of the losses that `check` returns; starts over."""
        losses = self.check(step)
        self._losses.clear()
        return float(np.mean(losses))

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self._ranks.sum(torch.stack(self._losses)) if self._losses else torch.empty(0)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`; the losses of all ranks continue on rank 0."""
        self._losses = list(_on_main_only(state["losses"], self._ranks))


class Spread(NamedTuple):
    """How far embeddings are from all being equal."""

    std: float  # mean standard deviation per dimension, times sqrt(D): 1 on an even sphere, 0 if all are equal
    effective_rank: float  # exp of the entropy of the normalised singular values: 1 on a line, at most min(M, D)


def measure_spread(embeddings: Tensor) -> Spread:
    """Spread of unit vectors [M, D], M >= 1, computed on the CPU: waits for the device.

    The deviation indicates collapse in SimSiam (Chen & He, CVPR 2021), section 4.1; the effective rank is RankMe
    (Garrido et al., ICML 2023), after Roy & Vetterli (2007).
    """
    vectors = embeddings.double().cpu()
    deviation = vectors.std(dim=0, correction=0).mean() * vectors.shape[1] ** 0.5
    gram = vectors @ vectors.T if len(vectors) <= vectors.shape[1] else vectors.T @ vectors
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    weights = singular / singular.sum().clamp_min(1e-12)
    return Spread(float(deviation), float(torch.special.entr(weights).sum().exp()))


class CollapseMonitor:
    """Detects that the embeddings are collapsing, and since which step.

    A single low spread can be chance, as in a bank of few entries: three in a row are a collapse.
    """

    def __init__(self) -> None:
        self._since, self._low = -1, 0  # step of the first of the low spreads in a row, and their number

    @property
    def since(self) -> int | None:
        """Step at which the collapse began; None: there is none."""
        return self._since if self._low >= _LOW_IN_A_ROW else None

    def update(self, spread: Spread, step: int) -> bool:
        """Add the spread after `step`; returns True once per collapse, when it is detected."""
        if spread.std >= _MIN_STD and spread.effective_rank >= _MIN_RANK:
            self._since, self._low = -1, 0
            return False
        if self._low == 0:
            self._since = step
        self._low += 1
        return self._low == _LOW_IN_A_ROW

    def state_dict(self) -> dict[str, Tensor]:
        return {"counters": torch.tensor([self._since, self._low])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._since, self._low = state["counters"].tolist()


class KnnMonitor:
    """kNN accuracies (0..1) by step; step 0 is the untrained network.

    Random convolutions already separate many images, so an accuracy means little without that of the untrained network.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self.accuracies: dict[int, float] = {}  # by step

    @property
    def untrained(self) -> float | None:
        return self.accuracies.get(0)

    def best(self, steps: Collection[int] | None = None) -> int | None:
        """The step with the highest accuracy since training began, among `steps` if given; the first of equals."""
        known = [step for step in self.accuracies if step > 0 and (steps is None or step in steps)]
        return max(known, key=lambda step: (self.accuracies[step], -step), default=None)

    def update(self, step: int, accuracy: float, images: int) -> str | None:
        """Add the accuracy on so many `images`; returns a warning when training begins to do harm.

        Accuracies differ by chance: a fall counts if it is more than two standard errors of the difference.
        """
        before = self._problem(images)
        self.accuracies[step] = accuracy
        problem = self._problem(images)
        if problem is None or (before is not None and before[0] == problem[0]):
            return None
        return problem[1]

    def _problem(self, images: int) -> tuple[str, str] | None:
        """Kind and text of what the latest accuracy says, if that is bad."""
        best = self.best()
        if best is None:
            return None
        latest = self.accuracies[max(self.accuracies)]
        if self.untrained is not None and latest < self.untrained:
            chance = "" if _differ(latest, self.untrained, images) else ", though by no more than chance may cause"
            return "below", (
                f"{self._k}-NN accuracy {latest:.1%} is below that of the untrained network, {self.untrained:.1%}"
                f"{chance}: so far, training has not made the features better"
            )
        if _differ(latest, self.accuracies[best], images):
            return "fallen", (
                f"{self._k}-NN accuracy has fallen to {latest:.1%}, from its best of {self.accuracies[best]:.1%} at "
                f"step {best:,}. A checkpoint of that step, if there is one, is kept"
            )
        return None

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "steps": torch.tensor(list(self.accuracies), dtype=torch.int64),
            "accuracies": torch.tensor(list(self.accuracies.values()), dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.accuracies = dict(zip(state["steps"].tolist(), state["accuracies"].tolist(), strict=True))


def _differ(one: float, two: float, images: int) -> bool:
    """Whether two accuracies on so many images differ by more than two standard errors."""
    return abs(one - two) > 2 * float(np.sqrt((one * (1 - one) + two * (1 - two)) / images))


def _on_main_only(counts: Tensor, ranks: Ranks) -> Tensor:
    return counts if ranks.is_main else torch.zeros_like(counts)
