"""The choice of images for a page."""

import numpy as np
import pytest

from msf_faiss.neighbors.page_images import PageImages, collect_page_images


class Neighbors:
    """The neighbours of each image."""

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


def test_images_are_collected_breadth_first() -> None:
    page = collect_page_images([4], [], 5, Neighbors(ring(10)), range(10))
    assert page.keys.tolist() == [4, 5, 6, 7, 8]
    assert page.complete.tolist() == [True, True, True, True, False]
    both = collect_page_images([0, 5], [], 6, Neighbors(ring(10)), range(10))
    assert both.keys.tolist() == [0, 5, 1, 6, 2, 7]


@pytest.mark.parametrize("budget", [1, 4, 5, 17, 60, 100, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_complete_images_have_all_neighbours_on_the_page(budget: int, seed: int) -> None:
    rows = random_rows(100, 4, seed)
    page = collect_page_images([3, 50], [99, 7], budget, Neighbors(rows), range(100))
    keys = page.keys.tolist()
    forced = {3, 50, *rows[3], *rows[50], 99, 7}
    assert keys[:2] == [3, 50]
    assert len(set(keys)) == len(keys) == max(len(forced), min(budget, 100))
    assert forced <= set(keys)
    for key, complete in zip(keys, page.complete.tolist(), strict=True):
        assert complete == (set(rows[key]) <= set(keys))
    assert page.complete[:2].all()


def test_page_continues_from_other_images() -> None:
    """Three groups without links between them, and images without neighbours."""
    rows = [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4], [3, 4], [], []]
    page = collect_page_images([0], [], 9, Neighbors(rows), [1, 6, 8, 7, 3])
    assert sorted(page.keys.tolist()) == list(range(9))
    assert page.complete.all()
    some = collect_page_images([0], [], 5, Neighbors(rows), [1, 8, 7, 6, 3])
    assert some.keys.tolist() == [0, 1, 2, 8, 7]
    whole = collect_page_images([0], [], 7, Neighbors(rows), [4, 3])
    assert whole.keys.tolist() == [0, 1, 2, 4, 3, 5]  # the remaining images are not among the others
    assert whole.complete.all()


def test_page_of_an_image_without_neighbours() -> None:
    page = collect_page_images([0], [], 10, Neighbors([[-1, -1]]), [0])
    assert isinstance(page, PageImages)
    assert (page.keys.tolist(), page.complete.tolist()) == ([0], [True])
