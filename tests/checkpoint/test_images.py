"""Names and labels of the training images in a checkpoint, and what it says if they have changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from small_states import CONFIG

from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.checkpoint.images import describe_images, find_changes
from msf_faiss.checkpoint.save import save_checkpoint
from msf_faiss.data.source import Source
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.train.state import TrainState

Change = Callable[[Path], object]


def write_images(folder: Path) -> Path:
    for name in ("a/0", "a/1", "a/2", "b/3", "b/4", "b/5"):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), 40 * int(path.stem)).save(path)
    return folder


def save(run_dir: Path, source: Source, state: TrainState) -> Path:
    tensors = {**state.tensors(), "data": describe_images(source)}
    return save_checkpoint(run_dir, step=7, epoch=1, config=CONFIG, dataset_size=len(source), tensors=tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: None, None),
        (lambda folder: (folder / "a" / "2.png").touch(), None),
        (lambda folder: (folder / "a" / "notes.txt").touch(), None),
        (lambda folder: (folder / "a" / "2.png").rename(folder / "a" / "9.png"), "a/2.png is gone; a/9.png is new"),
        (
            lambda folder: (folder / "a" / "0.png").unlink(),
            "there were 6 training images, now there are 5; a/0.png is gone",
        ),
        (
            lambda folder: (folder / "b").rename(folder / "c"),
            "3 images (b/3.png, …) are gone; 3 images (c/3.png, …) are",
        ),
    ],
    ids=["nothing", "touched", "no image", "renamed", "removed", "class renamed"],
)
def test_changed_folder(tmp_path: Path, state: TrainState, change: Change, said: str | None) -> None:
    """Wherever the folder lies."""
    checkpoint = find_checkpoint(save(tmp_path / "run", FolderSource(write_images(tmp_path / "images")), state))
    moved = shutil.move(tmp_path / "images", tmp_path / "moved")
    change(moved)
    changes = find_changes(checkpoint, FolderSource(moved))
    assert changes.labels is None
    assert (changes.images is None) == (said is None)
    assert (said or "") in (changes.images or "")


class Listed:
    """A source of names and labels."""

    def __init__(self, names: str, labels: list[int] | None = None) -> None:
        import numpy as np

        self._names = names.split()
        self.labels = None if labels is None else np.array(labels)

    def __len__(self) -> int:
        return len(self._names)

    def relative_names(self) -> list[str]:
        return self._names


@pytest.mark.parametrize(
    ("names", "labels", "images", "new_labels"),
    [
        ("x y \udcff", [0, 1, 1], None, None),
        ("y x \udcff", [1, 0, 1], "they have another order: image 0 was x, is y", None),
        ("x x y", [0, 1, 1], r"\udcff is gone; x is new", None),
        ("x y \udcff", [0, 2, 0], None, "2 of 3 labels have changed: that of y was 1, is 2"),
        ("x y \udcff", None, None, "3 of 3 labels have changed: that of x was 0, is -1"),
    ],
)
def test_order_and_labels(
    tmp_path: Path, state: TrainState, names: str, labels: list[int] | None, images: str | None, new_labels: str | None
) -> None:
    checkpoint = find_checkpoint(save(tmp_path, Listed("x y \udcff", [0, 1, 1]), state))  # type: ignore[arg-type]
    assert find_changes(checkpoint, Listed(names, labels)) == (images, new_labels)  # type: ignore[arg-type]


def test_checkpoint_of_version_3_has_only_the_number(saved: Path) -> None:
    checkpoint = find_checkpoint(saved)  # without the file
    assert find_changes(checkpoint, Listed(" ".join("x" * 90))) == (None, None)  # type: ignore[arg-type]
    found = find_changes(checkpoint, Listed("x"))  # type: ignore[arg-type]
    assert found.images == "there were 90 training images, now there are 1"
