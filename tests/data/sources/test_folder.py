from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msf_faiss.config import FolderData
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.sources.open import Split, open_source
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


@pytest.mark.parametrize("split", ["train", "test"])
def test_files_that_are_left_out_are_counted_in_one_line(
    split: Split, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train/1.png", "test/1.png", "test/2.heic", "test/3.HEIC", "test/notes.txt", "test/Thumbs.db"):
        put(tmp_path / name)
    open_source(FolderData(path=tmp_path / "train", test_path=tmp_path / "test"), split)
    said = f"{tmp_path}/test: left out 3 files (no images, or of formats that are not read): 2 .heic (to read them,"
    assert [said in record.message for record in caplog.records] == ([True] if split == "test" else [])


def test_a_folder_of_unread_formats_says_so(tmp_path: Path) -> None:
    put(tmp_path / "1.heic")
    with pytest.raises(UserError, match=r"contains no images \(left out: 1 \.heic \(to read them, install pillow-heif"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    ("stray", "remedy"),
    [("stray.png", "move or remove it, or set"), ("a/deep/stray.png", "move it, or set data.labels=folders, or set")],
)
def test_a_stray_image_that_removes_the_labels_is_named(
    stray: str, remedy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a/1.png", "b/1.png", stray):
        put(tmp_path / name)
    source = open_source(FolderData(path=tmp_path), "train")
    assert source is not None
    assert source.labels is None
    said = (
        f"because {tmp_path}/{stray} is not exactly one folder deep (1 of 3 images are not); {remedy} data.labels=none"
    )
    assert said in caplog.text
    caplog.clear()
    open_source(FolderData(path=tmp_path, labels="none"), "train")
    assert not caplog.records


def test_splits_that_are_merged_are_said(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "val/a/1.png", "other/a/1.png"):
        put(tmp_path / name)
    said = f"{tmp_path}: uses the images of all splits, train and val; to use one, set data.path={tmp_path}/train"
    assert FolderSource(tmp_path).notes == [said]
    assert FolderSource(tmp_path / "train").notes == []


def test_classes_that_look_alike_are_shown_apart(tmp_path: Path) -> None:
    for name in ("caf\xe9", "cafe\u0301", "tea"):
        put(tmp_path / "train" / name / "1.png")
    source = FolderSource(tmp_path / "train")
    assert source.classes == ("cafe\u0301 ('cafe\\u0301')", "caf\xe9 ('caf\\xe9')", "tea")
    put(tmp_path / "test/caf\xe9/1.png")
    held_out = open_source(FolderData(path=tmp_path / "train", test_path=tmp_path / "test"), "test")
    assert held_out is not None
    assert held_out.labels is not None
    assert held_out.labels.tolist() == [1]


def test_held_out_classes_may_be_in_another_unicode_form(tmp_path: Path) -> None:
    """As macOS writes them."""
    for name in ("train/caf\xe9/1.png", "train/tea/1.png", "test/cafe\u0301/1.png"):
        put(tmp_path / name)
    source = open_source(FolderData(path=tmp_path / "train", test_path=tmp_path / "test"), "test")
    assert source is not None
    assert source.classes == ("caf\xe9", "tea")
    assert source.labels is not None
    assert source.labels.tolist() == [0]


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found"])
def test_folders_of_the_system_are_no_classes(name: str, tmp_path: Path) -> None:
    for folder in ("a", "b", name, f"a/{name}/1.png"):
        put(tmp_path / folder / "1.png")
    assert FolderSource(tmp_path).classes == ("a", "b")


@pytest.mark.parametrize(
    ("path", "test_path"),
    [("set", "set/test"), ("set/train", "set"), ("set", "link"), ("set/../set", "set/a/b")],
)
def test_held_out_images_among_the_training_images_are_refused(tmp_path: Path, path: str, test_path: str) -> None:
    for name in ("train/1.png", "test/1.png", "a/b/1.png"):
        put(tmp_path / "set" / name)
    (tmp_path / "link").symlink_to(tmp_path / "set/test")
    config = FolderData(path=tmp_path / path, test_path=tmp_path / test_path, labels="none")
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"data\.test_path .* and data\.path .* have images in common"):
            open_source(config, split)  # type: ignore[arg-type]


@pytest.mark.parametrize("test_path", ["set/.held-out", "set", "other"])
def test_held_out_images_may_be_hidden_or_the_training_images(tmp_path: Path, test_path: str) -> None:
    for name in ("set/a/1.png", "set/.held-out/a/1.png", "other/a/1.png"):
        put(tmp_path / name)
    source = open_source(FolderData(path=tmp_path / "set", test_path=tmp_path / test_path), "test")
    assert source is not None
    assert len(source) == 1


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
    (tmp_path / "file").unlink()
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
