"""Which images a page shows, so that whatever is shown can be clicked.

Shapes: P images of the page, M images, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Grown(NamedTuple):
    """The images of a page, the queries first."""

    keys: NDArray[np.int64]  # [P]
    complete: NDArray[np.bool_]  # [P] all neighbours of the image are on the page


def grow(
    queries: Sequence[int],
    required: Iterable[int],
    budget: int,
    neighbors: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    anywhere: Iterable[int],
) -> Grown:
    """Collect images breadth first over their neighbours, until there are `budget`.

    Queries, their neighbours and `required` are on the page whatever the budget. An image whose neighbours do not all
    fit any more brings none of them.

    Args:
        queries: where to begin, none twice.
        required: others that must be there.
        budget: P, unless more are required or there are fewer.
        neighbors: of [M] images, [M, K], -1 where there are no more.
        anywhere: images to go on from where all neighbours are there and the budget is not used up.
    """
    page = dict.fromkeys(queries)  # in the page's order
    nearest = neighbors(np.fromiter(page, np.int64))
    for row in nearest.tolist():
        page |= dict.fromkeys(other for other in row if other >= 0)
    page |= dict.fromkeys(required)
    budget = max(budget, len(page))
    frontier = list(page)[len(queries) :]
    rest = iter(anywhere)
    while True:
        if not frontier and len(page) < budget:
            # Several at a time, and no more than can bring their neighbours.
            few = max(1, (budget - len(page)) // (1 + nearest.shape[1]))
            frontier = list(islice((key for key in rest if key not in page), few))
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
    return Grown(keys, missing == 0)
