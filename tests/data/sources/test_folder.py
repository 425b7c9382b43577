from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from msf_faiss.config import FolderData
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.sources.open import open_source
from msf_faiss.errors import UserError


def put(path: Path, gray: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    format = "PNG" if path.suffix.lower() != ".avif" else "AVIF"
    Image.fromarray(np.full((5, 6, 3), gray, np.uint8)).save(path, format)


def found(source: FolderSource, root: Path) -> list[str]:
    return [str(source.path(index).relative_to(root)) for index in range(len(source))]


def test_subfolders_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.PNG", "a/z.jpeg", "c/.hidden.png", "c/notes.txt", "b/._1.png"):
        put(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("no image")
    source = FolderSource(tmp_path)
    assert isinstance(source, Source)
    assert found(source, tmp_path) == ["a/z.jpeg", "b/1.PNG", "b/2.png"]
    assert source.classes == ("a", "b")  # c has no images
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["a/1.png", "2.png"], ["a/b/1.png", "a/2.png"]])
def test_trees_of_other_depths_are_unlabelled(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        put(tmp_path / name)
    source = FolderSource(tmp_path)
    assert len(source) == 2
    assert source.labels is None
    assert source.classes is None


def test_labels_none_and_folders(tmp_path: Path) -> None:
    put(tmp_path / "a/deep/er/1.png")
    put(tmp_path / "b/1.png")
    assert FolderSource(tmp_path, labels="none").labels is None
    assert FolderSource(tmp_path, labels="folders").classes == ("a", "b")
    put(tmp_path / "loose.png")
    with pytest.raises(UserError, match=r"loose\.png is in no class folder.*data\.labels=none"):
        FolderSource(tmp_path, labels="folders")


def test_every_image_extension_is_found(tmp_path: Path) -> None:
    extensions = ["jpg", "JPEG", "png", "ppm", "bmp", "pgm", "tif", "tiff", "WebP"] + ["avif"] * features.check("avif")
    for extension in extensions:
        put(tmp_path / f"x.{extension}")
    assert len(FolderSource(tmp_path)) == len(extensions)


def test_links_are_followed_except_loops(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere/1.png")
    put(tmp_path / "set/a/1.png")
    (tmp_path / "set/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/a/2.png").symlink_to(tmp_path / "elsewhere/1.png")
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/a/self").symlink_to(tmp_path / "set/a")
    assert found(FolderSource(tmp_path / "set", labels="none"), tmp_path / "set") == ["a/1.png", "a/2.png", "b/1.png"]


def test_decode(tmp_path: Path) -> None:
    for gray in (10, 20, 30):
        put(tmp_path / f"{gray}.png", gray)
    source = pickle.loads(pickle.dumps(FolderSource(tmp_path)))
    images = [source.decode(index) for index in (2, 0, 2)]
    assert [image.shape for image in images] == [(3, 5, 6)] * 3
    assert [int(image[0, 0, 0]) for image in images] == [30, 10, 30]


def test_file_names_need_not_be_utf8(tmp_path: Path) -> None:
    put(tmp_path / "plain.png", 7)
    (tmp_path / "plain.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    source = FolderSource(tmp_path)
    assert int(source.decode(0)[0, 0, 0]) == 7
    assert source.name(0).encode() == os.fsencode(tmp_path) + rb"/caf\udce9.png"


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    put(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG but not really")
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    source = FolderSource(tmp_path)
    assert len(source) == 3
    with pytest.raises(UnreadableImageError, match=r"bad\.png: cannot read"):
        source.decode(0)
    with pytest.raises(UnreadableImageError, match=r"broken\.png: cannot read this image: No such file"):
        source.decode(1)


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone does not exist; set data\.path"):
        FolderSource(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file, not a folder"):
        FolderSource(tmp_path / "file")
    with pytest.raises(UserError, match=r"contains no images; set data\.path.*\.jpg"):
        FolderSource(tmp_path)


def test_held_out_labels_use_the_training_classes(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "test/c/1.png", "test/b/2.png"):
        put(tmp_path / name)
    config = FolderData(path=tmp_path / "train", test_path=tmp_path / "test")
    source = open_source(config, "test")
    assert source is not None
    assert source.classes == ("a", "b", "c")
    assert source.labels is not None
    assert source.labels.tolist() == [1, 2]
    put(tmp_path / "test/dogs/1.png")
    with pytest.raises(
        UserError, match=r"test has classes that the training images do not have: dogs; these have a, b, c"
    ):
        open_source(config, "test")


def test_without_test_path_there_is_no_held_out_source(tmp_path: Path) -> None:
    assert open_source(FolderData(path=tmp_path / "gone"), "test") is None
    put(tmp_path / "train/1.png")
    with pytest.raises(UserError, match=r"gone does not exist; set data\.test_path"):
        open_source(FolderData(path=tmp_path / "train", test_path=tmp_path / "gone"), "test")
