"""Embeddings have the right rows, and the encoder is not changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msf_faiss.config import Config, FolderData, TrainConfig, ViewsConfig
from msf_faiss.data.source import Reduce
from msf_faiss.data.sources.decode import unreadable
from msf_faiss.data.sources.memory import MemorySource
from msf_faiss.embeddings.extract import extract
from msf_faiss.errors import UserError
from msf_faiss.views.random_view import center_crop, normalize

CPU = torch.device("cpu")


class Undecoded(MemorySource):
    """Images that pretend to need decoding, which fails for `bad` ones."""

    in_memory = False

    def __init__(self, images: Tensor, labels: Sequence[int] | None, bad: Sequence[int] = ()) -> None:
        super().__init__(images, labels, None if labels is None else ("a", "b"), title="undecoded")
        self._bad = bad

    def decode(self, index: int, reduce: Reduce | None = None) -> Tensor:
        if index in self._bad:
            raise unreadable("undecoded", "bad")
        return super().decode(index, reduce)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (11, 3, 12, 15), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def config(unreadable: str = "error", workers: int = 0) -> Config:
    data = FolderData.model_validate({"path": "unused", "unreadable": unreadable, "workers": workers})
    return Config(data=data, views=ViewsConfig(size=12), train=TrainConfig(device="cpu"))


def embed_all(encoder: nn.Module, images: Tensor) -> Tensor:
    """The expected embeddings [N, 4]."""
    with torch.no_grad():
        return encoder.eval()(normalize(center_crop(list(images), config().views), config().views))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_all_images(encoder: nn.Module, images: Tensor, workers: int, batch_size: int) -> None:
    source = Undecoded(images, [0, 1] * 5 + [-1])
    found = extract(encoder, source, config=config(workers=workers), device=CPU, batch_size=batch_size)
    assert found.embeddings.dtype == torch.float32
    # With another batch size, convolutions add in another order.
    assert torch.allclose(found.embeddings, embed_all(encoder, images), atol=1e-6)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1] * 5 + [-1]
    assert found.ids.tolist() == list(range(11))


def test_chosen_images_keep_their_order(encoder: nn.Module, images: Tensor) -> None:
    found = extract(encoder, Undecoded(images, None), config=config(), device=CPU, ids=torch.tensor([9, 2, 2]))
    assert torch.allclose(found.embeddings, embed_all(encoder, images[[9, 2, 2]]), atol=1e-6)
    assert found.labels is None
    assert found.ids.tolist() == [9, 2, 2]


def test_encoder_is_unchanged(encoder: nn.Module, images: Tensor) -> None:
    encoder.train()
    encoder[1].eval()  # type: ignore[index]  # frozen by its owner
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = extract(encoder, Undecoded(images, None), config=config(), device=CPU)
    assert encoder.training
    assert [part.training for part in encoder.children()] == [True, False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not found.embeddings.requires_grad
    nn.Linear(4, 2)(found.embeddings).sum().backward()  # a probe can train on them


def test_mode_is_restored_after_an_error(encoder: nn.Module, images: Tensor) -> None:
    encoder.train()
    with pytest.raises(UserError, match="undecoded: cannot read"):
        extract(encoder, Undecoded(images, None, bad=[6]), config=config(), device=CPU)
    assert all(module.training for module in encoder.modules())


def test_skipped_unreadable_images_are_missing(encoder: nn.Module, images: Tensor) -> None:
    source = Undecoded(images, np.arange(11).tolist(), bad=[0, 6, 7])
    found = extract(encoder, source, config=config("skip"), device=CPU, batch_size=2)
    readable = [1, 2, 3, 4, 5, 8, 9, 10]
    assert found.ids.tolist() == readable
    assert found.labels is not None
    assert found.labels.tolist() == readable
    assert torch.allclose(found.embeddings, embed_all(encoder, images[readable]), atol=1e-6)
