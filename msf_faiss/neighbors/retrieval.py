"""The different images that a bank retrieves, for many queries at once.

Shapes: Q queries, K neighbours, F entries fetched, n filled slots, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.bank import Bank

_BATCH = 256  # queries searched at a time
_SCRATCH = 1 << 22  # entries fetched at a time: a few images may own most of a bank
_WIDER = 4  # times as many entries when a query's were of too few images


class ImageNeighbors(NamedTuple):
    """Different images that queries retrieved, the most similar first, each by its most similar entry."""

    ids: NDArray[np.int64]  # [Q, K], -1 where there are no more
    similarities: NDArray[np.float32]  # [Q, K] cosine; 0 where there are no more
    ages: NDArray[np.int64]  # [Q, K] entries pushed since; -1 where there are no more

    @property
    def most(self) -> int:
        """Neighbours of the query that has most."""
        return int((self.ids >= 0).sum(axis=1).max(initial=0))

    @classmethod
    def empty(cls, queries: int, k: int) -> ImageNeighbors:
        """No neighbours."""
        shape = queries, k
        return cls(np.full(shape, -1, np.int64), np.zeros(shape, np.float32), np.full(shape, -1, np.int64))

    @classmethod
    def joined(cls, parts: Sequence[ImageNeighbors]) -> ImageNeighbors:
        """Those of one query after the other; at least one part."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def of(self, rows: NDArray[np.int64]) -> ImageNeighbors:
        """Those of some queries."""
        return ImageNeighbors(self.ids[rows], self.similarities[rows], self.ages[rows])


def search_images(bank: Bank, queries: Tensor, query_ids: NDArray[np.int64], k: int) -> ImageNeighbors:
    """For each of `queries` [Q, D] (unit norm, on the bank's device) the `k` most similar other images.

    Args:
        bank: searched; not empty.
        queries: to ask for.
        query_ids: [Q] the images that the queries are, which are left out; an id that no entry has leaves none out.
        k: columns of the answer, >= 1.
    """
    ids = bank.ids(torch.arange(len(bank), device=bank.device)).cpu().numpy()  # [n]
    known = np.unique(ids)
    others = len(known) - np.isin(query_ids, known)  # [Q] images that there are besides the query's own
    # As many entries as k + 1 images have on average; more for those queries whose images have more.
    first = min(len(ids), -(-(k + 1) * len(ids) // len(known)))
    answer = ImageNeighbors.empty(len(queries), k)
    for start in range(0, len(queries), _BATCH):
        rows, fetch = np.arange(start, min(start + _BATCH, len(queries))), first
        while len(rows):
            step, short = max(1, _SCRATCH // fetch), []
            for part in np.split(rows, range(step, len(rows), step)):
                counts = _first_of_each(bank, queries, query_ids, part, fetch, answer)
                short.append(part[counts < np.minimum(k, others[part])])
            rows = np.concatenate(short) if fetch < len(ids) else rows[:0]
            fetch = min(len(ids), _WIDER * fetch)
    return answer


def _first_of_each(
    bank: Bank,
    queries: Tensor,
    query_ids: NDArray[np.int64],
    rows: NDArray[np.int64],
    fetch: int,
    answer: ImageNeighbors,
) -> NDArray[np.int64]:
    """Answer the queries `rows` [q] by the best entry of each image among `fetch` entries; how many images: [q]."""
    found = bank.search(queries[torch.from_numpy(rows).to(queries.device)], fetch)
    columns = (bank.ids(found.slots), found.similarities, bank.age(found.slots))
    ids, similarities, ages = (values.cpu().numpy() for values in columns)  # [q, F]
    order = np.argsort(ids, axis=1, kind="stable")  # of one image's entries the best stays the first
    grouped = np.take_along_axis(ids, order, axis=1)
    leads = np.ones(ids.shape, np.bool_)
    leads[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    wanted = np.empty(ids.shape, np.bool_)
    np.put_along_axis(wanted, order, leads, axis=1)
    wanted &= ids != query_ids[rows][:, None]
    ranks = np.cumsum(wanted, axis=1) - 1  # [q, F]
    wanted &= ranks < answer.ids.shape[1]
    query, place = np.nonzero(wanted)
    target = rows[query], ranks[query, place]
    answer.ids[target] = ids[query, place]
    answer.similarities[target] = similarities[query, place]
    answer.ages[target] = ages[query, place]
    counts: NDArray[np.int64] = wanted.sum(axis=1)
    return counts
