"""What the neighbours of many images have in common.

Shapes: A images that were asked, K neighbours of each, N images of the training set, n entries searched, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from msf_faiss.errors import UserError
from msf_faiss.neighbors.gallery import Gallery
from msf_faiss.neighbors.page_content import Histogram, Hub, Statistics
from msf_faiss.neighbors.retrieval import ImageNeighbors

_BINS = 40
_HUBS = 12


class Matches(NamedTuple):
    """Which neighbours have the class of who asked."""

    compared: NDArray[np.bool_]  # [A, K] both have a label
    same: NDArray[np.bool_]  # [A, K] and it is one

    def purity(self) -> float | None:
        """Share of the neighbours compared; None if none is."""
        return _share(self.same.sum(), self.compared.sum())

    def purity_of_each(self) -> NDArray[np.float64]:
        """[A], nan where no neighbour is compared."""
        count = self.compared.sum(axis=1)
        return np.where(count == 0, np.nan, self.same.sum(axis=1) / np.maximum(count, 1))


def match(asked: NDArray[np.int64], neighbors: NDArray[np.int64], labels: NDArray[np.int64]) -> Matches:
    """Compare the labels `asked` [A] with those of the `neighbors` [A, K], ids or -1, by `labels` [N]."""
    theirs = np.where(neighbors < 0, -1, labels[neighbors])  # [A, K]
    compared = (theirs >= 0) & (asked >= 0)[:, None]
    return Matches(compared, compared & (theirs == asked[:, None]))


def worst_first(gallery: Gallery, asked: NDArray[np.int64], found: ImageNeighbors) -> list[int]:
    """Those of the images `asked` [A] whose purity can be told, the lowest first.

    Of equal ones the more similar neighbours come first (their mean): a net that is sure of what the labels deny.

    Raises:
        UserError: if there are none.
    """
    purity = match(gallery.labels[asked], found.ids, gallery.labels).purity_of_each()
    there = found.ids >= 0
    similarity = np.where(there, found.similarities, 0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    order = np.lexsort((asked, -similarity, purity))  # nan last
    worst: list[int] = asked[order[: np.count_nonzero(~np.isnan(purity))]].tolist()
    if not worst:
        raise UserError(
            f"none of {len(asked):,} images has a label and a neighbour with one, so that no query is worse than "
            "another; leave --worst out"
        )
    return worst


def count(gallery: Gallery, asked: NDArray[np.int64], found: ImageNeighbors) -> Statistics:
    """Statistics of what the images `asked` [A] found; hubs are named by their ids."""
    labels, there = gallery.labels, found.ids >= 0
    matches = match(labels[asked], found.ids, labels)
    ranks = range(found.most)
    similarities = np.clip(found.similarities.astype(np.float64), -1, 1)
    times = np.bincount(found.ids[there], minlength=len(labels))  # [N] retrieved
    return Statistics(
        images=len(asked),
        similarity=_histogram(similarities, _even_edges(similarities[there]), there, matches.same),
        age=_ages(gallery, found, matches.same) if gallery.searched == "bank" else None,
        purity_by_rank=tuple(_share(matches.same[:, rank].sum(), matches.compared[:, rank].sum()) for rank in ranks),
        similarity_by_rank=tuple(_share(similarities[:, rank].sum(), there[:, rank].sum()) for rank in ranks),
        purity=matches.purity(),
        chance=_chance(gallery.entry_ids, asked, labels),
        hubs=_hubs(times, found.ids, matches, labels),
        never_retrieved=float((times[np.unique(gallery.entry_ids)] == 0).mean()),
        purity_by_class=_by_class(gallery, asked, matches),
    )


def _share(part: np.number, whole: np.number) -> float | None:
    return float(part / whole) if whole else None


def _even_edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Around all `values` [*] in -1..1, from hundredth to hundredth."""
    if len(values) == 0:
        return np.linspace(0, 1, _BINS + 1)
    low, high = np.floor(values.min() * 100) / 100, np.ceil(values.max() * 100) / 100
    return np.linspace(low - 0.01 * (low == high), high, _BINS + 1)


def _histogram(
    values: NDArray[np.float64], edges: NDArray[np.float64], there: NDArray[np.bool_], same: NDArray[np.bool_]
) -> Histogram:
    matching, others = (np.histogram(values[some], edges)[0].astype(np.int64) for some in (same, there & ~same))
    return Histogram(edges=edges, matching=matching, others=others)


def _ages(gallery: Gallery, found: ImageNeighbors, same: NDArray[np.bool_]) -> Histogram:
    """Over all ages that there are in the bank."""
    entries = len(gallery.bank)
    return _histogram(
        found.ages.astype(np.float64), np.linspace(0, entries, min(_BINS, entries) + 1), found.ids >= 0, same
    )


def _chance(entries: NDArray[np.int64], asked: NDArray[np.int64], labels: NDArray[np.int64]) -> float | None:
    """Mean over labelled images of the share of others' labelled entries that have their class."""
    asked = asked[labels[asked] >= 0]
    if len(asked) == 0:
        return None
    own = np.bincount(entries, minlength=len(labels))[asked]  # [A] entries, all with the label of who asks
    by_class = np.bincount(labels[entries][labels[entries] >= 0], minlength=int(labels.max()) + 1)  # [C]
    others = by_class.sum() - own
    return _share(
        (by_class[labels[asked]] - own)[others > 0].astype(float) @ (1 / others[others > 0]), (others > 0).sum()
    )


def _hubs(
    times: NDArray[np.int64], neighbors: NDArray[np.int64], matches: Matches, labels: NDArray[np.int64]
) -> tuple[Hub, ...]:
    """The images retrieved most often, of equal ones the first."""
    most = np.argsort(-times, kind="stable")[:_HUBS]
    by_match = [
        np.bincount(neighbors[which], minlength=len(times)) for which in (matches.same, matches.compared)
    ]  # [N] each
    return tuple(
        Hub(
            node=index,
            retrieved=int(times[index]),
            matching=_share(by_match[0][index], by_match[1][index]) if labels[index] >= 0 else None,
        )
        for index in most.tolist()
        if times[index] > 0
    )


def _by_class(gallery: Gallery, asked: NDArray[np.int64], matches: Matches) -> tuple[tuple[str, float, int], ...]:
    """Class, purity and images asked, the worst first; classes without anything to compare are left out."""
    if gallery.classes is None:
        return ()
    labels = gallery.labels[asked]
    labelled = labels >= 0
    same, compared, images = (
        np.bincount(labels[labelled], weights, len(gallery.classes))
        for weights in (matches.same.sum(axis=1)[labelled], matches.compared.sum(axis=1)[labelled], None)
    )
    rows = [
        (name, float(same[label] / compared[label]), int(images[label]))
        for label, name in enumerate(gallery.classes)
        if compared[label]
    ]
    return tuple(sorted(rows, key=lambda row: row[1]))
