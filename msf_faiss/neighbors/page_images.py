"""Collect the images of a page, so that the neighbours of most of them are on the page too.

Shapes: P images of the page, M images, K neighbours.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class PageImages(NamedTuple):
    """The images of a page, queries first."""

    keys: NDArray[np.int64]  # [P]
    complete: NDArray[np.bool_]  # [P] whether all neighbours of the image are on the page


def collect_page_images(
    queries: Sequence[int],
    required: Iterable[int],
    budget: int,
    neighbors: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    others: Iterable[int],
) -> PageImages:
    """Collect `budget` images, breadth first from the queries to neighbours of neighbours.

    Queries, their neighbours and `required` are included whatever the budget. The neighbours of an image are included
    all together or, if they exceed the budget, not at all.

    Args:
        queries: where to begin; all different.
        required: other images to include.
        budget: P, unless more are required or fewer exist.
        neighbors: function from keys [M] to the keys of their neighbours [M, K], padded with -1.
        others: images to continue from when no new neighbours are left.
    """
    page = dict.fromkeys(queries)  # an ordered set
    nearest = neighbors(np.fromiter(page, np.int64))
    for row in nearest.tolist():
        page |= dict.fromkeys(other for other in row if other >= 0)
    page |= dict.fromkeys(required)
    budget = max(budget, len(page))
    frontier = list(page)[len(queries) :]
    rest = iter(others)
    while True:
        if not frontier and len(page) < budget:
            # Continue from as many images as have room for their neighbours.
            count = max(1, (budget - len(page)) // (1 + nearest.shape[1]))
            frontier = list(islice((key for key in rest if key not in page), count))
            page |= dict.fromkeys(frontier)
        if not frontier:
            break
        reached: list[int] = []
        for row in neighbors(np.array(frontier, np.int64)).tolist():
            new = [other for other in row if other >= 0 and other not in page]
            if len(page) + len(new) <= budget:
                page |= dict.fromkeys(new)
                reached += new
        frontier = reached
    keys = np.fromiter(page, np.int64)
    missing = np.isin(neighbors(keys), np.append(keys, -1), invert=True).sum(axis=1)  # [P]
    return PageImages(keys, missing == 0)
