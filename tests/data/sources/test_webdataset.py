from __future__ import annotations

import errno
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from tars import grays, png, sample, shard, source, write

from msf_faiss.config import WebDatasetData
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.data.sources import decode as decode_module
from msf_faiss.data.sources import webdataset as webdataset_module
from msf_faiss.data.sources.open import open_source
from msf_faiss.errors import UserError


def test_single_shard(tmp_path: Path) -> None:
    opened = source(shard(tmp_path / "x.tar", range(10)))
    assert isinstance(opened, Source)
    assert len(opened) == 10
    assert opened.classes == ("0", "1")
    assert opened.labels is not None
    assert opened.labels.tolist() == [0, 1] * 5
    assert grays(opened, [9, 0, 4, 4]) == [9, 0, 4, 4]
    assert opened.name(7) == f"{tmp_path}/x.tar, 7.png"


@pytest.mark.parametrize(
    "pattern", ["{tmp}", "{tmp}/train-{{00..02}}.tar", "{tmp}/train-0*.tar", "{tmp}/*/../train-*.tar"]
)
def test_folders_and_patterns_of_shards(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "cache").mkdir()
    shard(tmp_path / "train-02.tar", range(7, 9))
    shard(tmp_path / "train-00.tar", range(4))
    write(tmp_path / "train-01.tar")
    (tmp_path / "README.md").touch()
    opened = source(Path(pattern.format(tmp=tmp_path)), tmp_path)
    assert grays(opened) == [0, 1, 2, 3, 7, 8]
    assert opened.name(4).endswith("/train-02.tar, 7.png")


def test_samples_without_an_image_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "x.tar", *sample(1, 1), ("2.cls", b"0"), ("2.txt", b"words"), *sample(3, 3))
    for _ in range(2):  # the second time from the cache
        assert grays(source(path)) == [1, 3]
        assert source(path).notes == [f"{path}: left out 1 sample without an image (with the extensions cls, txt)"]
    open_source(WebDatasetData(path=path, cache_dir=tmp_path / "cache"), "train")
    assert "left out 1 sample" in caplog.text
    with pytest.raises(
        UserError, match=r"no sample of .*x\.tar has a file with the extension jpg .*extensions cls, png"
    ):
        source(path, image_keys=("jpg",))
    with pytest.raises(UserError, match=r"e\.tar contains no samples; set data\.path"):
        source(write(tmp_path / "e.tar"))


def test_images_whose_names_have_dots_are_counted(tmp_path: Path) -> None:
    dotted = [(f"v1.0_{number:04d}.jpg", png(number)) for number in range(10)]
    opened = source(write(tmp_path / "x.tar", *sample("a", 7), *dotted, ("README", b"")))
    assert grays(opened) == [7]
    assert opened.notes[1:] == [
        f"{tmp_path}/x.tar: left out 10 images with a dot within their names, such as v1.0_0000.jpg: WebDataset takes"
        " all that follows the first dot as the extension, here 0_0000.jpg; rename them, or list these extensions in"
        " data.image_keys",
        f"{tmp_path}/x.tar: left out 1 file without an extension",
    ]
    assert grays(source(write(tmp_path / "y.tar", ("v1.jpg", png(5)), *dotted))) == [5]
    assert "left out 10 images" in source(tmp_path / "y.tar").notes[0]
    mask = write(tmp_path / "z.tar", ("1.png", png(5)), ("1.seg.png", png(6)))
    assert source(mask).notes == []
    with pytest.raises(UserError, match=r"no sample .* \(left out: .*10 images with a dot within their names"):
        source(write(tmp_path / "none.tar", *dotted))


@pytest.mark.parametrize("ending", ["avif", "jfif", "JPE", "gif", "jp2", "tga", "dib", "tiff"])
def test_every_format_that_pillow_reads_is_taken(tmp_path: Path, ending: str) -> None:
    assert len(source(write(tmp_path / "x.tar", (f"1.{ending}", png(1))))) == 1


def test_heic_needs_pillow_heif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.tar", *sample(1, 1), ("2.heic", b"?"))
    assert "to read HEIC, install pillow-heif" in source(path).notes[0]
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: None))
    assert len(source(path)) == 2


def test_class_names(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufeffcat\n dog \nhen\n\n", encoding="utf-8")
    path = shard(tmp_path / "x.tar", range(6), classes=2)
    assert source(path, class_names=tmp_path / "names.txt").classes == ("cat", "dog", "hen")
    (tmp_path / "alike.txt").write_text("caf\xe9\ncafe\u0301\ncrane\ncrane\n", encoding="utf-8")
    alike = ("caf\xe9 ('caf\\xe9')", "cafe\u0301 ('cafe\\u0301')", "crane", "crane")  # ImageNet has two cranes
    assert source(path, class_names=tmp_path / "alike.txt").classes == alike
    path = shard(tmp_path / "y.tar", range(6), classes=5)
    with pytest.raises(UserError, match=r"the label of .*y\.tar, 4\.png is 4, but there are 3 classes.*class_names"):
        source(path, class_names=tmp_path / "names.txt")
    with pytest.raises(UserError, match=r"gone\.txt cannot be read: .*data\.class_names to a text file"):
        source(path, class_names=tmp_path / "gone.txt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe cannot be read: it is no file; set data\.class_names"):
        source(path, class_names=tmp_path / "pipe")


def test_held_out_labels_use_the_training_classes(tmp_path: Path) -> None:
    train, test = shard(tmp_path / "a.tar", range(6), classes=3), shard(tmp_path / "b.tar", range(2))
    config = WebDatasetData(path=train, test_path=test, cache_dir=tmp_path / "cache")
    opened = open_source(config, "test")
    assert opened is not None
    assert opened.classes == ("0", "1", "2")
    shard(test, range(4), classes=4)
    with pytest.raises(UserError, match=r"3\.png is 3, but there are 3 classes .*correct data\.test_path"):
        open_source(config, "test")
    assert open_source(WebDatasetData(path=train), "test") is None


def test_missing_labels_are_refused_if_configured(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", *sample(1, 1))
    assert source(path).labels is None
    with pytest.raises(UserError, match=r"no sample of .*x\.tar has a file with the extension \.id; set data"):
        source(path, label_key="id")


def test_missing_files_and_invalid_patterns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty contains no \*\.tar files; set data\.path"):
        source(tmp_path / "empty")
    with pytest.raises(UserError, match=r"gone\.tar does not exist; set data\.path to a tar file on this machine"):
        source(tmp_path / "gone.tar")
    (tmp_path / "empty/x.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(UserError, match=r"x\.tar is not a file; remove it"):
        source(tmp_path / "empty")
    shard(tmp_path / "train-0.tar", range(2))
    with pytest.raises(UserError, match=r"train-1\.tar \(of .*train-\{0\.\.1\}\.tar\) does not exist"):
        source(tmp_path / "train-{0..1}.tar")
    for pattern in ("train-{0..1.tar", "${GONE}.tar"):
        with pytest.raises(UserError, match=r"is not a valid pattern: .*; correct data\.path"):
            source(tmp_path / pattern)
    with pytest.raises(UserError, match=r"does not exist; set data\.path to a tar file on this machine"):
        source(Path("https://example.org/train-0.tar"), tmp_path)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", *sample(1, 1), ("2.png", b"no image"), ("3.png", b""))
    opened = source(path)
    for index, problem in ((1, "it is 8 bytes in no known image format"), (2, "it is an empty file")):
        with pytest.raises(UnreadableImageError, match=rf"x\.tar, {index + 1}\.png: cannot read this image: {problem}"):
            opened.decode(index)
    path.unlink()
    assert grays(opened, [0]) == [1]  # the file is still open
    with pytest.raises(UnreadableImageError, match=r"x\.tar, 1\.png: cannot read this image: No such file"):
        pickle.loads(pickle.dumps(opened)).decode(0)


def test_a_changed_shard_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", range(3))
    opened = source(path)
    shard(path, range(3, 9))
    with pytest.raises(UserError, match=r"x\.tar has changed since it was opened; start the command again"):
        opened.decode(0)
    assert grays(source(path)) == [3, 4, 5, 6, 7, 8]


def test_the_number_of_open_files_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    for number in range(5):
        shard(tmp_path / f"{number}.tar", range(number, number + 1))
    opened = source(tmp_path)
    grays(opened, [])
    before, already = descriptors(), webdataset_module._Shard._open
    monkeypatch.setattr(webdataset_module, "_MOST_OPEN", already + 2)
    for _ in range(2):
        assert grays(opened) == [0, 1, 2, 3, 4]
    assert descriptors() <= before + 2
    del opened
    assert webdataset_module._Shard._open == already


def test_sources_are_pickled_without_the_index(tmp_path: Path) -> None:
    opened = source(write(tmp_path / "x.tar", *(m for i in range(3000) for m in sample(i, i % 256))))
    grays(opened, [0])
    pickled = pickle.dumps(opened)
    assert len(pickled) < 1500
    assert grays(pickle.loads(pickled), [2999]) == [2999 % 256]


@pytest.mark.shared_data
def test_real_images(shared_data: Path, tmp_path: Path) -> None:
    rows = pq.read_table(shared_data / "imagenette224_mini_val.parquet").slice(0, 40).to_pylist()
    write(tmp_path / "x.tar", *((f"{i}.jpg", row["image"]["bytes"]) for i, row in enumerate(rows)))
    assert min(min(image.shape[1:]) for image in map(source(tmp_path / "x.tar").decode, range(40))) >= 150


def test_shard_is_opened_again_after_a_transient_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = source(shard(tmp_path / "x.tar", range(4)))
    assert grays(opened, [0]) == [0]
    failures = [errno.ESTALE, errno.EIO]
    read = os.pread

    def fail(descriptor: int, size: int, offset: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "stale")
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(decode_module, "_PAUSES", (0.0, 0.0))
    assert grays(opened, [1, 2, 3]) == [1, 2, 3]
