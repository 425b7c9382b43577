"""CIFAR and STL-10, from small files in the original formats."""

from __future__ import annotations

import hashlib
import pickle
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from msf_faiss.config import TorchvisionData
from msf_faiss.data.source import Source
from msf_faiss.data.sources.open import open_source
from msf_faiss.errors import UserError


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 of four images a batch: training image i is uniformly i."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def dump(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, md5(folder / name)]

    pixels = np.arange(20, dtype=np.uint8).repeat(3072).reshape(5, 4, 3072)
    train = [dump(f"data_batch_{part + 1}", {"data": pixels[part], "labels": [0, 1, 2, 9]}) for part in range(5)]
    pixels = np.stack([np.arange(3).repeat(1024)] * 2).astype(np.uint8)  # red 0, green 1, blue 2
    test = dump("test_batch", {"data": pixels, "labels": [3, 4]})
    meta = dump("batches.meta", {"label_names": [f"class {label}" for label in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [test])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path


@pytest.fixture
def stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An STL-10 of two labelled, three unlabelled and one test image, stored by columns as the original."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()

    def dump(name: str, content: np.ndarray[Any, Any] | bytes) -> list[str]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.astype(np.uint8).tobytes())
        return [name, md5(folder / name)]

    columns = np.broadcast_to(np.arange(96)[:, None], (3, 96, 96))  # stored transposed: x * 96 + y
    train = [dump("train_X.bin", np.stack([columns] * 2)), dump("train_y.bin", np.array([1, 10]))]
    train.append(dump("unlabeled_X.bin", np.stack([columns] * 3)))
    test = [dump("test_X.bin", columns), dump("test_y.bin", np.array([5]))]
    dump("class_names.txt", "\n".join("abcdefghij").encode())
    monkeypatch.setattr(datasets.STL10, "train_list", train)
    monkeypatch.setattr(datasets.STL10, "test_list", test)
    return tmp_path


def opened(config: TorchvisionData, split: Any) -> Source:
    source = open_source(config, split)
    assert source is not None
    return source


def test_cifar10(cifar10: Path) -> None:
    config = TorchvisionData(kind="cifar10", root=cifar10, download=False)
    train, test = opened(config, "train"), opened(config, "test")
    assert (len(train), len(test)) == (20, 2)
    assert train.in_memory
    assert train.classes == tuple(f"class {label}" for label in range(10))
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1, 2, 9] * 5
    assert [int(image.sum()) for image in map(train.decode, [19, 0])] == [19 * 3072, 0]
    assert test.decode(0)[:, 31, 31].tolist() == [0, 1, 2]
    assert test.name(1) == "cifar10 test[1]"


def test_stl10_training_images_include_the_unlabelled_ones(stl10: Path) -> None:
    config = TorchvisionData(kind="stl10", root=stl10, download=False)
    train, test = opened(config, "train"), opened(config, "test")
    assert (len(train), len(test)) == (5, 1)
    assert train.labels is not None
    assert train.labels.tolist() == [0, 9, -1, -1, -1]
    assert train.classes == test.classes == tuple("abcdefghij")
    assert test.labels is not None
    assert test.labels.tolist() == [4]
    assert torch.equal(train.decode(4)[0, 0], torch.arange(96, dtype=torch.uint8))


@pytest.mark.parametrize("kind", ["cifar10", "cifar100", "stl10"])
def test_a_missing_data_set_without_download_is_refused(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(UserError, match=rf"{kind} cannot be opened in .*; set data\.download=true, or data\.root"):
        open_source(TorchvisionData(kind=kind, root=tmp_path, download=False), "train")


def test_a_failed_download_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(
        UserError, match=rf"cifar10 .*service not known.*check the connection, or .* copy it to {tmp_path}"
    ):
        open_source(TorchvisionData(kind="cifar10", root=tmp_path), "train")


def test_a_damaged_data_set_is_refused(cifar10: Path) -> None:
    (cifar10 / "cifar-10-batches-py/data_batch_3").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"cifar10 cannot be opened in .*corrupted"):
        open_source(TorchvisionData(kind="cifar10", root=cifar10, download=False), "train")
