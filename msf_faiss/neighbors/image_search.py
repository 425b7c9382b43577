"""Search the most similar images rather than entries, of which a bank may have several per image.

Shapes: Q queries, K neighbours, E entries fetched, n filled slots, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.bank import Bank

_BATCH = 256  # queries per search
_MAX_ENTRIES = 1 << 22  # fetched at once: a few images may own most of a bank
_GROWTH = 4  # factor by which more entries are fetched for queries whose entries had too few images


class ImageNeighbors(NamedTuple):
    """Different images per query, most similar first, each represented by its most similar entry."""

    ids: NDArray[np.int64]  # [Q, K], padded with -1
    similarities: NDArray[np.float32]  # [Q, K] cosine, padded with 0
    ages: NDArray[np.int64]  # [Q, K] number of entries pushed since, padded with -1

    @property
    def max_count(self) -> int:
        """Largest number of neighbours of a query."""
        return int((self.ids >= 0).sum(axis=1).max(initial=0))

    @classmethod
    def empty(cls, queries: int, k: int) -> ImageNeighbors:
        """Only padding."""
        shape = queries, k
        return cls(np.full(shape, -1, np.int64), np.zeros(shape, np.float32), np.full(shape, -1, np.int64))

    @classmethod
    def concatenate(cls, parts: Sequence[ImageNeighbors]) -> ImageNeighbors:
        """The neighbours of the queries of all parts, of which there is at least one."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def take(self, rows: NDArray[np.int64]) -> ImageNeighbors:
        """The neighbours of some queries."""
        return ImageNeighbors(self.ids[rows], self.similarities[rows], self.ages[rows])


def search_images(bank: Bank, queries: Tensor, query_ids: NDArray[np.int64], k: int) -> ImageNeighbors:
    """The `k` most similar other images for each query.

    Args:
        bank: not empty.
        queries: [Q, D] unit norm, on the bank's device.
        query_ids: [Q] ids of the queries' own images, which are left out; -1 for none.
        k: columns of the result, >= 1.
    """
    ids = bank.ids(torch.arange(len(bank), device=bank.device)).cpu().numpy()  # [n]
    images = np.unique(ids)
    others = len(images) - np.isin(query_ids, images)  # [Q] images in the bank other than the query's own
    # First fetch as many entries as k + 1 images have on average, then more for queries that need them.
    first = min(len(ids), -(-(k + 1) * len(ids) // len(images)))
    result = ImageNeighbors.empty(len(queries), k)
    for start in range(0, len(queries), _BATCH):
        rows, fetch = np.arange(start, min(start + _BATCH, len(queries))), first
        while len(rows):
            step, incomplete = max(1, _MAX_ENTRIES // fetch), []
            for part in np.split(rows, range(step, len(rows), step)):
                counts = _fill_rows(bank, queries, query_ids, part, fetch, result)
                incomplete.append(part[counts < np.minimum(k, others[part])])
            rows = np.concatenate(incomplete) if fetch < len(ids) else rows[:0]
            fetch = min(len(ids), _GROWTH * fetch)
    return result


def _fill_rows(
    bank: Bank,
    queries: Tensor,
    query_ids: NDArray[np.int64],
    rows: NDArray[np.int64],
    fetch: int,
    result: ImageNeighbors,
) -> NDArray[np.int64]:
    """Fill `rows` [q] of the result with the best entry of each image among `fetch` entries; counts the images [q]."""
    entries = bank.search(queries[torch.from_numpy(rows).to(queries.device)], fetch)
    columns = (bank.ids(entries.slots), entries.similarities, bank.age(entries.slots))
    ids, similarities, ages = (values.cpu().numpy() for values in columns)  # [q, E]
    order = np.argsort(ids, axis=1, kind="stable")  # keeps the best entry of an image first
    grouped = np.take_along_axis(ids, order, axis=1)
    first_of_image = np.ones(ids.shape, np.bool_)
    first_of_image[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    chosen = np.empty(ids.shape, np.bool_)
    np.put_along_axis(chosen, order, first_of_image, axis=1)
    chosen &= ids != query_ids[rows][:, None]
    ranks = np.cumsum(chosen, axis=1) - 1  # [q, E]
    chosen &= ranks < result.ids.shape[1]
    query, column = np.nonzero(chosen)
    target = rows[query], ranks[query, column]
    result.ids[target] = ids[query, column]
    result.similarities[target] = similarities[query, column]
    result.ages[target] = ages[query, column]
    counts: NDArray[np.int64] = chosen.sum(axis=1)
    return counts
