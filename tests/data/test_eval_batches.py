from itertools import pairwise

import numpy as np
import pytest
import torch
from fake_source import FakeSource, config
from torch import Tensor

from msf_faiss.config import WeakView
from msf_faiss.data.eval_batches import eval_batches
from msf_faiss.data.source import UnreadableImageError
from msf_faiss.errors import UserError
from msf_faiss.views.random_view import center_crop

CPU = torch.device("cpu")


def test_center_views_come_in_the_order_of_the_ids() -> None:
    source, ids = FakeSource(30), np.array([5, 29, 5, 0, 7])
    batches = list(eval_batches(source, ids, config=config(), batch_size=2))
    assert [batch.ids.tolist() for batch in batches] == [[5, 29], [5, 0], [7]]
    expected = center_crop([source.decode(index) for index in ids.tolist()], config().views)
    assert torch.equal(torch.cat([batch.crops.pixels for batch in batches]), expected)
    assert batches[0].views(CPU, config().views).dtype == torch.float32


def test_random_views_do_not_depend_on_batch_size_or_workers() -> None:
    def views(epoch: int, batch_size: int, workers: int = 0) -> Tensor:
        settings, view = config(workers=workers), WeakView(crop_scale=(0.08, 1))
        batches = eval_batches(
            FakeSource(30), np.arange(30), config=settings, batch_size=batch_size, view=view, epoch=epoch
        )
        return torch.cat([batch.views(CPU, settings.views) for batch in batches])

    same = [views(0, 7), views(0, 30), views(0, 7, workers=2)]
    assert same[0].shape == (30, 3, 16, 16)
    assert all(torch.equal(one, other) for one, other in pairwise(same))
    assert not torch.equal(same[0], views(1, 7))


def test_unreadable_images_are_left_out() -> None:
    source, skip = FakeSource(6, bad=[2, 3]), config(unreadable="skip")
    batches = list(eval_batches(source, np.arange(6), config=skip, batch_size=2))
    assert [batch.ids.tolist() for batch in batches] == [[0, 1], [4, 5]]  # no empty batch
    with pytest.raises(UserError, match=r"none of the 2 images can be read; the first: fake 2"):
        list(eval_batches(source, np.array([2, 3]), config=skip, batch_size=2))
    with pytest.raises(UnreadableImageError, match="fake 2"):
        list(eval_batches(source, np.arange(6), config=config(), batch_size=2))
    with pytest.raises(UserError, match=r"more than data\.unreadable_limit"):
        list(eval_batches(source, np.arange(6), config=config(unreadable="skip", unreadable_limit=1), batch_size=2))
