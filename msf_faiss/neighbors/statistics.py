"""Statistics of the neighbours of many images.

Shapes: A sampled images, K neighbours of each, N training images, n entries of the gallery, C classes.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from msf_faiss.errors import UserError
from msf_faiss.neighbors.confusion import compute_confusion
from msf_faiss.neighbors.gallery import Gallery
from msf_faiss.neighbors.image_search import ImageNeighbors
from msf_faiss.neighbors.page_content import ClassPurity, Histogram, Hub, Statistics
from msf_faiss.neighbors.records import Interval, Summary

_BINS = 40
_HUBS = 12
_Z = 1.959964  # the central 95 % of a normal distribution lie within so many standard deviations


class Matches(NamedTuple):
    """Which neighbours have the query's class."""

    compared: NDArray[np.bool_]  # [A, K] both have a label
    same: NDArray[np.bool_]  # [A, K] both have the same label

    def purity(self) -> float | None:
        """Fraction of the compared neighbours; None if there are none."""
        return _ratio(self.same.sum(), self.compared.sum())

    def purity_interval(self) -> Interval | None:
        return purity_interval(self.same.sum(axis=1), self.compared.sum(axis=1))

    def purity_per_query(self) -> NDArray[np.float64]:
        """[A], nan for queries without compared neighbours."""
        count = self.compared.sum(axis=1)
        return np.where(count == 0, np.nan, self.same.sum(axis=1) / np.maximum(count, 1))


def compare_labels(query_labels: NDArray[np.int64], neighbors: NDArray[np.int64], labels: NDArray[np.int64]) -> Matches:
    """Compare labels of queries [A] with those of their neighbours (ids [A, K], padded with -1), by `labels` [N]."""
    neighbor_labels = np.where(neighbors < 0, -1, labels[neighbors])  # [A, K]
    compared = (neighbor_labels >= 0) & (query_labels >= 0)[:, None]
    return Matches(compared, compared & (neighbor_labels == query_labels[:, None]))


def purity_interval(same: NDArray[np.int64], compared: NDArray[np.int64]) -> Interval | None:
    """95 % interval of the purity sum(same) / sum(compared), both [A] per query; None if nothing is compared.

    Wilson's score interval (JASA 22, 1927) for the effective number of neighbours, p (1 - p) / variance, with the
    variance of a ratio between queries: the neighbours of one query resemble each other and count for fewer (Korn and
    Graubard, Survey Methodology 24, 1998). Where p is 0 or 1, each query counts once.
    """
    total, queries = compared.sum(), np.count_nonzero(compared)
    if total == 0:
        return None
    purity = same.sum() / total
    residuals = same - purity * compared
    variance = queries / max(1, int(queries) - 1) * (residuals @ residuals) / total**2
    if purity in (0, 1) or queries == 1:
        effective = float(queries)
    else:
        effective = min(float(total), purity * (1 - purity) / max(variance, 1e-12))
    center = purity + _Z**2 / (2 * effective)
    half = _Z * np.sqrt(purity * (1 - purity) / effective + (_Z / (2 * effective)) ** 2)
    low, high = (float(end / (1 + _Z**2 / effective)) for end in (center - half, center + half))
    return max(0.0, low), min(1.0, high)


def worst_first(gallery: Gallery, sample: NDArray[np.int64], neighbors: ImageNeighbors) -> list[int]:
    """Images of `sample` [A] ordered by purity, lowest first, without those whose purity is undefined.

    Among equal ones, those with more similar neighbours come first: a confident network against its labels.

    Raises:
        UserError: if there are none.
    """
    purity = compare_labels(gallery.labels[sample], neighbors.ids, gallery.labels).purity_per_query()
    exists = neighbors.ids >= 0
    similarity = np.where(exists, neighbors.similarities, 0).sum(axis=1) / np.maximum(exists.sum(axis=1), 1)
    order = np.lexsort((sample, -similarity, purity))  # nan last
    worst: list[int] = sample[order[: np.count_nonzero(~np.isnan(purity))]].tolist()
    if not worst:
        raise UserError(
            f"--worst needs labels, but none of {len(sample):,} images has a label and a labelled neighbour; leave it "
            "out"
        )
    return worst


def compute_summary(gallery: Gallery, sample: NDArray[np.int64], neighbors: ImageNeighbors) -> Summary:
    """Means over the neighbours of the images `sample` [A]."""
    labels, exists = gallery.labels, neighbors.ids >= 0
    matches = compare_labels(labels[sample], neighbors.ids, labels)
    ranks = range(neighbors.max_count)
    similarities = np.where(exists, np.clip(neighbors.similarities.astype(np.float64), -1, 1), 0)
    return Summary(
        images=len(sample),
        purity=matches.purity(),
        purity_interval=matches.purity_interval(),
        chance=_chance(gallery.entry_ids, sample, labels),
        purity_by_rank=tuple(_ratio(matches.same[:, rank].sum(), matches.compared[:, rank].sum()) for rank in ranks),
        similarity=_ratio(similarities.sum(), exists.sum()),
        similarity_by_rank=tuple(_ratio(similarities[:, rank].sum(), exists[:, rank].sum()) for rank in ranks),
        age=_ratio(neighbors.ages[exists].sum(), exists.sum()) if gallery.searched == "bank" else None,
    )


def compute_statistics(gallery: Gallery, sample: NDArray[np.int64], neighbors: ImageNeighbors) -> Statistics:
    """Statistics of the neighbours of the images `sample` [A]; hubs have ids as nodes."""
    labels, exists = gallery.labels, neighbors.ids >= 0
    matches = compare_labels(labels[sample], neighbors.ids, labels)
    similarities = np.clip(neighbors.similarities.astype(np.float64), -1, 1)
    counts = np.bincount(neighbors.ids[exists], minlength=len(labels))  # [N] times retrieved
    return Statistics(
        summary=compute_summary(gallery, sample, neighbors),
        similarity=_histogram(similarities, _similarity_edges(similarities[exists]), exists, matches.same),
        age=_age_histogram(gallery, neighbors, matches.same) if gallery.searched == "bank" else None,
        hubs=_hubs(counts, neighbors.ids, matches, labels),
        never_retrieved=float((counts[np.unique(gallery.entry_ids)] == 0).mean()),
        purity_by_class=_purity_by_class(gallery, sample, matches),
        confusion=None if gallery.classes is None else compute_confusion(labels[sample], neighbors.ids, labels),
    )


def _ratio(part: np.number, whole: np.number) -> float | None:
    return float(part / whole) if whole else None


def _similarity_edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of bins that cover all `values` [*] in -1..1; the outer edges are multiples of 0.01."""
    if len(values) == 0:
        return np.linspace(0, 1, _BINS + 1)
    low, high = np.floor(values.min() * 100) / 100, np.ceil(values.max() * 100) / 100
    return np.linspace(low - 0.01 * (low == high), high, _BINS + 1)


def _histogram(
    values: NDArray[np.float64], edges: NDArray[np.float64], exists: NDArray[np.bool_], same: NDArray[np.bool_]
) -> Histogram:
    matching, others = (np.histogram(values[rows], edges)[0].astype(np.int64) for rows in (same, exists & ~same))
    return Histogram(edges=edges, matching=matching, others=others)


def _age_histogram(gallery: Gallery, neighbors: ImageNeighbors, same: NDArray[np.bool_]) -> Histogram:
    """Over the ages of all entries in the bank."""
    entries = len(gallery.bank)
    edges = np.linspace(0, entries, min(_BINS, entries) + 1)
    return _histogram(neighbors.ages.astype(np.float64), edges, neighbors.ids >= 0, same)


def _chance(entry_ids: NDArray[np.int64], sample: NDArray[np.int64], labels: NDArray[np.int64]) -> float | None:
    """Expected purity of random entries: for each labelled image, the fraction of other images' labelled entries that
    have its class; averaged."""
    sample = sample[labels[sample] >= 0]
    if len(sample) == 0:
        return None
    own = np.bincount(entry_ids, minlength=len(labels))[sample]  # [A] entries, all with the image's label
    by_class = np.bincount(labels[entry_ids][labels[entry_ids] >= 0], minlength=int(labels.max()) + 1)  # [C]
    others = by_class.sum() - own
    return _ratio(
        (by_class[labels[sample]] - own)[others > 0].astype(float) @ (1 / others[others > 0]), (others > 0).sum()
    )


def _hubs(
    counts: NDArray[np.int64], neighbors: NDArray[np.int64], matches: Matches, labels: NDArray[np.int64]
) -> tuple[Hub, ...]:
    """The images retrieved most often; among equal ones, the lowest id first."""
    most = np.argsort(-counts, kind="stable")[:_HUBS]
    same, compared = (
        np.bincount(neighbors[which], minlength=len(counts)) for which in (matches.same, matches.compared)
    )
    return tuple(
        Hub(
            node=index,
            retrieved=int(counts[index]),
            matching=_ratio(same[index], compared[index]) if labels[index] >= 0 else None,
        )
        for index in most.tolist()
        if counts[index] > 0
    )


def _purity_by_class(gallery: Gallery, sample: NDArray[np.int64], matches: Matches) -> tuple[ClassPurity, ...]:
    """The classes with compared neighbours, lowest purity first."""
    if gallery.classes is None:
        return ()
    labels = gallery.labels[sample]
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    same, compared = matches.same.sum(axis=1), matches.compared.sum(axis=1)  # [A]
    rows = []
    for label, of_class in zip(present.tolist(), np.split(order, starts[1:]), strict=True):
        interval = purity_interval(same[of_class], compared[of_class])
        if interval is not None:
            purity = float(same[of_class].sum() / compared[of_class].sum())
            rows.append(
                ClassPurity(name=gallery.classes[label], purity=purity, interval=interval, images=len(of_class))
            )
    return tuple(sorted(rows, key=lambda row: row.purity))
