"""Which images a page shows."""

import numpy as np
import pytest

from msf_faiss.neighbors.page_images import Grown, grow


class Neighbors:
    """Neighbours by image."""

    def __init__(self, rows: list[list[int]]) -> None:
        width = max(map(len, rows))
        self.rows = np.array([row + [-1] * (width - len(row)) for row in rows], np.int64)

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        return self.rows[keys]


def random_rows(images: int, k: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.delete(np.arange(images), own))[:k].tolist() for own in range(images)]


def ring(images: int) -> list[list[int]]:
    return [[(own + 1) % images] for own in range(images)]


def test_images_come_breadth_first() -> None:
    grown = grow([4], [], 5, Neighbors(ring(10)), range(10))
    assert grown.keys.tolist() == [4, 5, 6, 7, 8]
    assert grown.complete.tolist() == [True, True, True, True, False]
    both = grow([0, 5], [], 6, Neighbors(ring(10)), range(10))
    assert both.keys.tolist() == [0, 5, 1, 6, 2, 7]


@pytest.mark.parametrize("budget", [1, 4, 5, 17, 60, 100, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_every_neighbour_of_a_complete_image_is_there(budget: int, seed: int) -> None:
    rows = random_rows(100, 4, seed)
    grown = grow([3, 50], [99, 7], budget, Neighbors(rows), range(100))
    page = grown.keys.tolist()
    forced = {3, 50, *rows[3], *rows[50], 99, 7}
    assert page[:2] == [3, 50]
    assert len(set(page)) == len(page) == max(len(forced), min(budget, 100))
    assert forced <= set(page)
    for key, complete in zip(page, grown.complete.tolist(), strict=True):
        assert complete == (set(rows[key]) <= set(page))
    assert grown.complete[:2].all()


def test_where_all_is_reached_the_page_goes_on_anywhere() -> None:
    """Three groups without links between them, and images that no one retrieves."""
    rows = [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4], [3, 4], [], []]
    grown = grow([0], [], 9, Neighbors(rows), [1, 6, 8, 7, 3])
    assert sorted(grown.keys.tolist()) == list(range(9))
    assert grown.complete.all()
    some = grow([0], [], 5, Neighbors(rows), [1, 8, 7, 6, 3])
    assert some.keys.tolist() == [0, 1, 2, 8, 7]
    whole = grow([0], [], 7, Neighbors(rows), [4, 3])
    assert whole.keys.tolist() == [0, 1, 2, 4, 3, 5]  # nothing else is to be had
    assert whole.complete.all()


def test_one_image_and_none_to_retrieve() -> None:
    grown = grow([0], [], 10, Neighbors([[-1, -1]]), [0])
    assert isinstance(grown, Grown)
    assert (grown.keys.tolist(), grown.complete.tolist()) == ([0], [True])
