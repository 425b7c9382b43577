import numpy as np
import pytest

from msf_faiss.data.sources.demo import CLASSES, render


def test_images_depend_only_on_their_seed_and_id() -> None:
    ids = np.array([12, 3, 2_500, 999, 1_000, 10**9 + 7])
    images, labels = render(ids, seed=0)
    assert images.shape == (6, 32, 32, 3)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert labels.tolist() == [2, 3, 0, 9, 0, 7]
    whole, _ = render(np.arange(2_600), seed=0)
    for row, index in enumerate(ids[:5]):
        assert np.array_equal(images[row], whole[index])
        assert np.array_equal(images[row], render(ids[row : row + 1], seed=0)[0][0])
    assert not np.array_equal(whole, render(np.arange(2_600), seed=1)[0])


def test_images_are_gray_balanced_and_varied() -> None:
    images, labels = render(np.arange(2_000), seed=3)
    assert np.array_equal(images[..., 0], images[..., 1])
    assert np.array_equal(images[..., 0], images[..., 2])
    assert np.bincount(labels).tolist() == [200] * len(CLASSES) == [200] * 10
    assert len(np.unique(images.reshape(2_000, -1), axis=0)) == 2_000
    assert images.std(axis=(1, 2, 3)).min() > 5  # no flat image
    assert images.mean(axis=(1, 2, 3)).std() > 20  # light varies, so brightness reveals nothing


@pytest.mark.parametrize("size", [8, 16, 33, 64])
def test_images_of_any_size(size: int) -> None:
    assert render(np.arange(20), seed=0, size=size)[0].shape == (20, size, size, 3)


def test_no_images_and_invalid_arguments() -> None:
    images, labels = render(np.arange(0), seed=0)
    assert images.shape == (0, 32, 32, 3)
    assert labels.shape == (0,)
    for arguments in ({"ids": np.array([-1]), "seed": 0}, {"ids": np.arange(2), "seed": -1}):
        with pytest.raises(ValueError, match="must not be negative"):
            render(**arguments)
    with pytest.raises(ValueError, match="size at least 8"):
        render(np.arange(2), seed=0, size=7)
