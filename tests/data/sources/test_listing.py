"""Cached lists of large folders, and how changes of the folders are noticed."""

from __future__ import annotations

import errno
import inspect
import io
import logging
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, features

from msf_faiss.data.sources import listing
from msf_faiss.data.sources.folder import FolderSource
from msf_faiss.data.sources.listing import Names, describe_left_out, list_images
from msf_faiss.errors import UserError


@pytest.fixture(autouse=True)
def _small_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_FEWEST", 2)
    monkeypatch.setattr(listing, "_SETTLED", 20_000_000)  # ns; the clock of file systems on Linux ticks every 4 ms


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/1.png", "a/2.png", "b/c/3.jpg", "b/c/note.txt", ".hidden/4.png", "d/empty"):
        touch(tmp_path / "set" / name)
    settle()
    return tmp_path / "set"


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def settle() -> None:
    time.sleep(0.03)


def names(root: Path) -> list[str]:
    found = list_images(root, root.parent / "cache").names
    return [found[index] for index in range(len(found))]


def is_walked(root: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the folders are read. Checks that the list is complete in both cases."""
    expected = list_images(root)
    listed = expected.names
    with monkeypatch.context() as patch:
        walks: list[Path] = []
        walk = listing._walk
        patch.setattr(listing, "_walk", lambda *arguments: walks.append(arguments[0]) or walk(*arguments))
        assert names(root) == [listed[index] for index in range(len(listed))]
        assert list_images(root, root.parent / "cache").left_out == expected.left_out
    return bool(walks)


def test_lists_are_cached(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_walked(root, monkeypatch)
    assert not is_walked(root, monkeypatch)
    assert names(root) == ["a/1.png", "a/2.png", "b/c/3.jpg"]
    source = FolderSource(root, labels="folders", cache=root.parent / "cache")
    assert source.classes == ("a", "b")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1]


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda root: touch(root / "b/c/9.png"),
    "added to an empty folder": lambda root: touch(root / "d/9.png"),
    "added in a new folder": lambda root: touch(root / "e/f/9.png"),
    "removed": lambda root: (root / "a/1.png").unlink(),
    "renamed": lambda root: (root / "a/1.png").rename(root / "a/0.png"),
    "moved": lambda root: (root / "a/1.png").rename(root / "b/1.png"),
    "another ending": lambda root: (root / "b/c/note.txt").rename(root / "b/c/note.png"),
    "folder renamed": lambda root: (root / "a").rename(root / "z"),
    "folder swapped": lambda root: [(root / a).rename(root / b) for a, b in (("a", "x"), ("d", "a"), ("x", "d"))],
    "folder removed": lambda root: shutil.rmtree(root / "b"),
    "folder replaced by a copy": lambda root: (
        [shutil.copytree(root, root.parent / "new"), shutil.rmtree(root)] and (root.parent / "new").rename(root)
    ),
    "unhidden": lambda root: (root / ".hidden").rename(root / "hidden"),
    "times put back": lambda root: back_in_time(root / "a"),
}


def back_in_time(folder: Path) -> None:
    """Add a file and restore the folder's time of modification, as rsync and tar do."""
    before = folder.stat()
    touch(folder / "9.png")
    os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_invalidates_the_list(change: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names(root)
    CHANGES[change](root)
    assert is_walked(root, monkeypatch)
    settle()
    is_walked(root, monkeypatch)
    assert not is_walked(root, monkeypatch)


def test_changed_contents_of_files_do_not_matter(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names(root)
    (root / "a/1.png").write_text("other")
    touch(root / ".hidden/5.png")
    assert not is_walked(root, monkeypatch)


def test_links_are_followed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "elsewhere/deep/1.png")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "up").symlink_to(root)
    (root / "later").symlink_to(tmp_path / "later")
    (root / "gone.png").symlink_to(tmp_path / "gone.png")
    settle()
    assert names(root)[-2:] == ["gone.png", "link/deep/1.png"]
    assert not is_walked(root, monkeypatch)
    touch(tmp_path / "elsewhere/deep/2.png")
    assert is_walked(root, monkeypatch)
    settle()
    names(root)
    assert not is_walked(root, monkeypatch)
    touch(tmp_path / "later/3.png")
    assert is_walked(root, monkeypatch)
    assert "later/3.png" in names(root)


def test_deep_trees(tmp_path: Path) -> None:
    """Deeper than Python's recursion limit."""
    folders = [tmp_path]
    for _ in range(200):
        folders.append(folders[-1] / "d")
        folders[-1].mkdir()
    (folders[-1] / "1.png").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        listed = list_images(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert listed.names[0].count(os.sep) == 200


def test_folders_that_link_to_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_MOST_VISITS", 100)
    folders = [tmp_path / str(number) for number in range(10)]
    for folder in folders:
        touch(folder / "1.png")
        for other in folders:
            (folder / f"to-{other.name}").symlink_to(other)
    with pytest.raises(UserError, match="is one of more than 100 paths to the same folder; remove links"):
        list_images(tmp_path)


@pytest.mark.parametrize("problem", [errno.ESTALE, errno.ENOTCONN, errno.EACCES, errno.EIO])
def test_folders_that_cannot_be_looked_at_are_named(problem: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.stat

    def gone(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("/c"):
            raise OSError(problem, os.strerror(problem))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", gone)
    with pytest.raises(UserError, match=f"b/c cannot be read: {os.strerror(problem)}; make it readable"):
        list_images(root)


# -- what is listed


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format)
    return buffer.getvalue()


def test_every_ending_that_pillow_reads_is_listed_or_counted(tmp_path: Path) -> None:
    Image.init()
    endings = {*Image.registered_extensions(), ".heic", ".txt", ".mp4", ".JPG"}
    for ending in endings:
        touch(tmp_path / f"x{ending}")
    listed = list_images(tmp_path)
    assert {".jfif", ".jpe", ".gif", ".jp2", ".tga", ".dib", ".avif", ".mpo", ".JPG"} <= {
        Path(listed.names[index]).suffix for index in range(len(listed.names))
    }
    assert {".heic", ".psd", ".pdf", ".txt", ".mp4"} <= listed.left_out.keys()
    assert len(listed.names) + listed.left_out.total() == len(endings)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_images_without_an_ending_are_listed(format: str, tmp_path: Path) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    for name in ("0a1b2c", "v1.0_0010", "photo.jpg ", "IMG.0001"):
        (tmp_path / name).write_bytes(encoded(format))
    others = {"README": b"BMW and P6 and GIF", "empty": b"", "cut": encoded(format)[:6], "backup.jpg~": encoded(format)}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link").symlink_to("0a1b2c")
    (tmp_path / "loop").symlink_to("loop")
    listed = list_images(tmp_path)
    found = [listed.names[index] for index in range(len(listed.names))]
    assert found == ["0a1b2c", "IMG.0001", "link", "photo.jpg ", "v1.0_0010"]
    assert listed.left_out == {"": 5, "special": 1, "~": 1}


def test_heic_is_listed_with_pillow_heif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "1.heic")
    assert "1 .heic (to read them, install pillow-heif)" in describe_left_out(list_images(tmp_path).left_out)
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: None))
    assert list_images(tmp_path).names[0] == "1.heic"


def test_left_out_files_are_described_by_kind() -> None:
    counts = Counter({".txt": 1_200, "": 3, **{f".{letter}": 1 for letter in "abcdefg"}})
    assert describe_left_out(counts) == "1,200 .txt, 3 without an ending, 1 .a, 1 .b, 1 .c, 1 .d, 3 others"


def test_folders_that_have_just_changed_are_not_cached(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two changes within a tick have the same time; a list made in between would look valid after the second."""
    monkeypatch.setattr(listing, "_SETTLED", 3_000_000_000)
    for number in range(100):
        touch(root / f"a/new{number}.png")
        names(root)
        touch(root / f"a/new{number}x.png")
        assert f"a/new{number}x.png" in names(root)
    assert not (root.parent / "cache").exists()


def test_a_change_during_listing_is_noticed_later(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def slow(folder: str) -> object:
        entries = list(scandir(folder))
        if folder.endswith("/c"):
            touch(root / "b/c/9.png")
        return entries

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", slow)
        assert "b/c/9.png" not in names(root)
    assert is_walked(root, monkeypatch)


def test_lists_of_small_folders_are_not_cached(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_FEWEST", 4)
    names(root)
    assert not (root.parent / "cache").exists()


def test_random_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    for step in range(40):
        files = [path for path in root.rglob("*.png") if path.is_file()]
        if draw.random() < 0.6 or not files:
            touch(root / draw.choice("abcd") / draw.choice(["", "x/", "y/"]) / f"{step}.png")
        elif draw.random() < 0.5:
            draw.choice(files).unlink()
        else:
            draw.choice(files).rename(root / f"{step}.png")
        if draw.random() < 0.3:
            settle()
        is_walked(root, monkeypatch)


# -- the cache


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "flipped", "folder"])
def test_a_damaged_list_is_replaced(damage: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = names(root)
    (file,) = (root.parent / "cache").iterdir()
    content = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        damaged = bytearray(content)
        damaged[content.index(b"a/1.png")] ^= 1
        file.write_bytes({"empty": b"", "cut": content[:-30], "noise": os.urandom(500), "flipped": damaged}[damage])
    assert is_walked(root, monkeypatch)
    assert names(root) == expected


def test_a_flipped_bit_never_changes_the_list(root: Path) -> None:
    expected = names(root)
    (file,) = (root.parent / "cache").iterdir()
    content = file.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        assert names(root) == expected


def test_a_cache_that_is_not_writable_is_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root.parent / "cache").touch()
    with caplog.at_level(logging.INFO):
        assert len(names(root)) == 3
    assert "cannot be cached in" in caplog.text


def test_a_full_disk_is_logged(root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(listing, "write_atomic", full)
    with caplog.at_level(logging.INFO):
        assert len(names(root)) == 3
    assert "No space left on device" in caplog.text


def test_concurrent_listing(root: Path) -> None:
    results: list[list[str]] = []
    threads = [threading.Thread(target=lambda: results.extend(names(root) for _ in range(10))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [["a/1.png", "a/2.png", "b/c/3.jpg"]] * 40
    assert len(list((root.parent / "cache").iterdir())) == 1


def test_names_are_packed_into_bytes() -> None:
    some = ["a/b/é.png", os.fsdecode(b"caf\xe9"), "", "x" * 300 + "/y"]
    packed = Names.pack(some)
    assert [packed[index] for index in range(len(packed))] == some
    assert packed.depths().tolist() == [2, 0, 0, 1]
    assert len(Names.pack([])) == 0
    assert Names.pack([]).depths().tolist() == []
