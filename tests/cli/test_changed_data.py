"""A run whose images have changed or moved since, as its commands meet it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from invoking import Invoke
from PIL import Image

from msf_faiss.config import Config, FlatBankConfig, FolderData, ModelConfig, NarrowBackbone, TrainConfig, ViewsConfig
from msf_faiss.train.trainer import pretrain

COMMANDS = {
    "resume": ("pretrain", "--out", "RUN"),
    "inspect": ("inspect-neighbors", "RUN", "--queries", "2", "--sample", "9", "--out", "x.json"),
    "index": ("index", "RUN", "--from-bank", "--out", "x.faiss"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its images."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (18, 18), (20 * number, 99, 9)).save(folder / "images" / name / f"{number}.png")
    config = Config(
        data=FolderData(path=folder / "images", workers=0),
        views=ViewsConfig(size=16),
        model=ModelConfig(backbone=NarrowBackbone(width=4, depths=(1,), strides=(2,)), dim=8),
        bank=FlatBankConfig(capacity=32),
        train=TrainConfig(epochs=2, batch_size=16, device="cpu", threads=1),
    )
    for _ in pretrain(config, folder / "run"):
        pass
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy, in the working directory, without the original images."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    hidden = trained.rename(trained.with_name("hidden"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    hidden.rename(trained)


def words(name: str, images: Path) -> list[str]:
    moved = ["--set", f"data.path={images}"]
    allowed = ["--allow-config-change", "data.path", "--set", "train.epochs=3", "--allow-config-change", "train.epochs"]
    return [*(word.replace("RUN", "run") for word in COMMANDS[name]), *moved, *(allowed if name == "resume" else [])]


@pytest.mark.parametrize("name", COMMANDS)
def test_other_images_of_the_same_number_are_refused(invoke: Invoke, copied: Path, name: str) -> None:
    images = copied / "images"
    (images / "cat" / "3.png").rename(images / "dog" / "30.png")
    done = invoke(*words(name, images))
    assert done.code == 2, done.stderr
    assert "cat/3.png is gone; dog/30.png is new" in done.stderr
    assert not list(copied.glob("x.*"))


@pytest.mark.parametrize("name", COMMANDS)
def test_moved_images_are_the_same_data(invoke: Invoke, copied: Path, name: str) -> None:
    done = invoke(*words(name, (copied / "images").rename(copied / "elsewhere")))
    assert done.code == 0, done.stderr
    assert " new" not in done.stderr
