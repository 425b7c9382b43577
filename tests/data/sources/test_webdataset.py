"""WebDataset shards: what counts as a sample, where its image lies, and every way to get a tar file wrong."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from msf_faiss.config import WebDatasetData
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.data.sources import tar_index
from msf_faiss.data.sources import webdataset as webdataset_shards
from msf_faiss.data.sources.open import open_source
from msf_faiss.data.sources.webdataset import WebDatasetSource
from msf_faiss.errors import UserError


def png(gray: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), gray, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, *members: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key: str | int, gray: int, label: int | None = None) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(gray)), *([] if label is None else [(f"{key}.cls", b"%d\n" % label)])]


def shard(path: Path, grays: range, classes: int = 2) -> Path:
    return write(path, *(member for gray in grays for member in sample(gray, gray, gray % classes)))


def source(path: Path, root: Path | None = None, **settings: Any) -> WebDatasetSource:
    cache = (root or path.parent) / "cache"
    return WebDatasetSource(WebDatasetData(path=path, **{"cache_dir": cache} | settings), path)


def grays(opened: WebDatasetSource, ids: Any = None) -> list[int]:
    return [int(image[0, 0, 0]) for image in opened.decode(range(len(opened)) if ids is None else ids)]


def test_one_shard(tmp_path: Path) -> None:
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
def test_shards_come_in_the_order_of_their_names(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "cache").mkdir()
    shard(tmp_path / "train-02.tar", range(7, 9))
    shard(tmp_path / "train-00.tar", range(4))
    write(tmp_path / "train-01.tar")
    (tmp_path / "README.md").touch()
    opened = source(Path(pattern.format(tmp=tmp_path)), tmp_path)
    assert grays(opened) == [0, 1, 2, 3, 7, 8]
    assert opened.name(4).endswith("/train-02.tar, 7.png")


def test_the_library_reads_the_same_samples(tmp_path: Path) -> None:
    """What its writer writes and its reader reads, names with dots and folders included."""
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for index, key in enumerate(["a/b.c/1", "a/b.c/2", "x", "n/1"]):
            writer.write({"__key__": key, "png": png(index), "cls": index, "json": {"extra": 1}})
    with (tmp_path / "x.tar").open("rb") as file:
        files = webdataset.tariterators.tar_file_expander([{"url": "x.tar", "stream": file}])
        expected = [(each["__key__"], int(each["cls"])) for each in webdataset.tariterators.group_by_keys(files)]
    assert len(expected) == 4
    opened = source(tmp_path / "x.tar")
    assert grays(opened) == [0, 1, 2, 3]
    assert opened.labels is not None
    assert opened.labels.tolist() == [label for _, label in expected]
    assert [opened.name(index).partition(", ")[2] for index in range(4)] == [f"{key}.png" for key, _ in expected]


def test_what_a_sample_may_look_like(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.tar",
        *[("__meta__/readme", b"?"), ("README", b"no ending"), ("folder/", b"")],
        *[("1.JPG", png(1)), ("1.CLS", b" 4 "), ("1.json", b"{}")],
        *[("2.seg.png", png(99)), ("2.png", png(2)), ("2.cls", b"-1")],
        *[("3.cls", b"3"), ("3.webp", png(98)), ("3.png", png(3))],
        *[("./4.png", png(4))],
        *[("1.png", png(5))],  # a key may come again later: another sample, as in the library
        format=tarfile.GNU_FORMAT,
    )
    opened = source(path)
    assert grays(opened) == [1, 2, 3, 4, 5]  # png comes before webp among the keys
    assert opened.labels is not None
    assert opened.labels.tolist() == [4, -1, 3, -1, -1]
    assert opened.classes == ("0", "1", "2", "3", "4")
    assert grays(source(path, image_keys=("seg.png",))) == [99]
    assert grays(source(path, image_keys=(".WEBP", "jpg"))) == [1, 98]
    assert source(path, label_key=None).labels is None
    assert source(path, label_key=None).classes is None


def test_names_of_any_length_and_bytes(tmp_path: Path) -> None:
    names = ["x" * 180 + "/" + "y" * 90, os.fsdecode(b"caf\xe9"), "日本/\n", "-rf *"]
    path = write(tmp_path / os.fsdecode(b"\xff{}[1] *.tar"), *(m for i, n in enumerate(names) for m in sample(n, i, 0)))
    opened = source(path)
    assert grays(opened) == [0, 1, 2, 3]
    for index in range(4):
        opened.name(index).encode()  # can be shown


def test_samples_without_an_image_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "x.tar", *sample(1, 1), ("2.cls", b"0"), ("2.txt", b"words"), *sample(3, 3))
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        assert grays(source(path)) == [1, 3]
        assert "samples without an image, left out: 1; they have cls, txt" in caplog.text
    with pytest.raises(UserError, match=r"no sample of .*x\.tar has an image ending in jpg; .*it has cls, png, txt"):
        source(path, image_keys=("jpg",))
    with pytest.raises(UserError, match=r"e\.tar holds no samples; set data\.path"):
        source(write(tmp_path / "e.tar"))


def test_names_of_classes(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufeffcat\n dog \nhen\n\n", encoding="utf-8")
    path = shard(tmp_path / "x.tar", range(6), classes=2)
    assert source(path, class_names=tmp_path / "names.txt").classes == ("cat", "dog", "hen")
    path = shard(tmp_path / "y.tar", range(6), classes=5)
    with pytest.raises(
        UserError, match=r"the label of .*y\.tar, 4\.png is 4, which names none of 3 classes.*class_names"
    ):
        source(path, class_names=tmp_path / "names.txt")
    with pytest.raises(UserError, match=r"gone\.txt cannot be read: .*data\.class_names to a text file"):
        source(path, class_names=tmp_path / "gone.txt")


def test_both_splits_number_their_classes_alike(tmp_path: Path) -> None:
    train, test = shard(tmp_path / "a.tar", range(6), classes=3), shard(tmp_path / "b.tar", range(2))
    config = WebDatasetData(path=train, test_path=test, cache_dir=tmp_path / "cache")
    opened = open_source(config, "test")
    assert opened is not None
    assert opened.classes == ("0", "1", "2")
    shard(test, range(4), classes=4)
    with pytest.raises(UserError, match=r"3\.png is 3, which names none of 3 classes .*correct data\.test_path"):
        open_source(config, "test")
    assert open_source(WebDatasetData(path=train), "test") is None


@pytest.mark.parametrize("text", [b"cat", b"", b"1.5", b"-2", b"99999999999999999999999", b"7" * 100])
def test_a_label_that_is_no_number_of_a_class(tmp_path: Path, text: bytes) -> None:
    path = write(tmp_path / "x.tar", ("1.png", png(1)), ("1.cls", text))
    with pytest.raises(
        UserError, match=r"x\.tar: 1\.cls holds b'.*' rather than the number of a class.*data\.label_key"
    ):
        source(path)


def test_a_label_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", *sample(1, 1))
    assert source(path).labels is None
    with pytest.raises(UserError, match=r"no sample of .*x\.tar has a label ending in \.id; set data\.label_key"):
        source(path, label_key="id")


# -- damage


def test_two_files_of_one_sample_with_one_ending(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.tar holds two files of one sample with the same ending.*1\.PNG"):
        source(write(tmp_path / "x.tar", ("1.png", png(1)), ("1.cls", b"0"), ("1.PNG", png(2))))


def test_compressed_files(tmp_path: Path) -> None:
    plain = shard(tmp_path / "x.tar", range(3)).read_bytes()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/x.tar.gz").write_bytes(gzip.compress(plain))
    for path in (tmp_path / "set", tmp_path / "set/x.tar.gz"):
        with pytest.raises(UserError, match=r"x\.tar\.gz is compressed.*unpack it with gunzip"):
            source(path, tmp_path)


def test_a_cut_within_a_file_is_noticed(tmp_path: Path) -> None:
    content = shard(tmp_path / "x.tar", range(3)).read_bytes()
    end = len(content.rstrip(b"\0"))
    for size in [0, 100, 511, 513, 600, 1023, 1025, 1500, end - 1]:
        path = tmp_path / f"cut{size}.tar"
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"cut{size}\.tar is not a complete tar file: .*; fetch or write it again"):
            source(path)
    assert not list((tmp_path / "cache").glob("*cut*"))


def test_a_missing_mark_of_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "x.tar", ("1.png", b"x" * 512), ("2.png", b"x" * 512))
    os.truncate(path, 2048)
    assert len(source(path)) == 2
    assert "ends without the mark of its end" in caplog.text


@pytest.mark.parametrize("header", [0, 1, 3])
def test_a_damaged_header_does_not_end_the_shard_in_silence(tmp_path: Path, header: int) -> None:
    path = write(tmp_path / "x.tar", *((f"{i}.png", b"x" * 512) for i in range(4)))
    content = bytearray(path.read_bytes())
    content[header * 1024 + 10] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tar is not a complete tar file"):
        source(path)


def test_what_is_no_tar_file(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(os.urandom(5000))
    with pytest.raises(UserError, match=r"x\.tar is not a complete tar file"):
        source(tmp_path / "x.tar")
    path = shard(tmp_path / "y.tar", range(2))
    path.chmod(0)
    if not os.access(path, os.R_OK):
        with pytest.raises(UserError, match=r"y\.tar cannot be read: Permission denied"):
            source(path)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no \*\.tar files; set data\.path"):
        source(tmp_path / "empty")
    with pytest.raises(UserError, match=r"gone\.tar does not exist; set data\.path to a tar file on this machine"):
        source(tmp_path / "gone.tar")
    (tmp_path / "empty/x.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(UserError, match=r"x\.tar is no file; remove it"):
        source(tmp_path / "empty")
    shard(tmp_path / "train-0.tar", range(2))
    with pytest.raises(UserError, match=r"train-1\.tar \(of .*train-\{0\.\.1\}\.tar\) does not exist"):
        source(tmp_path / "train-{0..1}.tar")
    for pattern in ("train-{0..1.tar", "${GONE}.tar"):
        with pytest.raises(UserError, match=r"is no pattern of files: .*; correct data\.path"):
            source(tmp_path / pattern)
    with pytest.raises(UserError, match=r"does not exist; set data\.path to a tar file on this machine"):
        source(Path("https://example.org/train-0.tar"), tmp_path)


# -- reading


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", *sample(1, 1), ("2.png", b"no image"), ("3.png", b""))
    opened = source(path)
    for index, problem in ((1, "8 bytes that are no image"), (2, "the file is empty")):
        with pytest.raises(UnreadableImageError, match=rf"x\.tar, {index + 1}\.png: cannot read this image: {problem}"):
            opened.decode([0, index])
    path.unlink()
    assert grays(opened, [0]) == [1]  # it was open
    with pytest.raises(UnreadableImageError, match=r"x\.tar, 1\.png: cannot read this image: No such file"):
        pickle.loads(pickle.dumps(opened)).decode([0])


def test_a_shard_that_changed_is_not_read_by_the_old_index(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", range(3))
    opened = source(path)
    shard(path, range(3, 9))
    with pytest.raises(UserError, match=r"x\.tar has changed since this run opened it; start it again"):
        opened.decode([0])
    assert grays(source(path)) == [3, 4, 5, 6, 7, 8]


def test_only_so_many_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    for number in range(5):
        shard(tmp_path / f"{number}.tar", range(number, number + 1))
    opened = source(tmp_path)
    grays(opened, [])
    before, already = descriptors(), webdataset_shards._Shard._open
    monkeypatch.setattr(webdataset_shards, "_MOST_OPEN", already + 2)
    for _ in range(2):
        assert grays(opened) == [0, 1, 2, 3, 4]
    assert descriptors() <= before + 2
    del opened
    assert webdataset_shards._Shard._open == already


# -- the index


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "x.tar", range(4))
    source(path)
    read = tar_index._samples
    monkeypatch.setattr(tar_index, "_samples", lambda *_: pytest.fail("read again"))
    assert grays(source(path)) == [0, 1, 2, 3]
    monkeypatch.setattr(tar_index, "_samples", read)
    os.utime(path, ns=(1, 1))
    source(path)
    source(path, label_key=None)
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"ARROW1\0\0 and then nothing of it", os.urandom(3000), None])
def test_a_damaged_index_is_made_anew(tmp_path: Path, damage: bytes | None) -> None:
    path = shard(tmp_path / "x.tar", range(4))
    source(path)
    (index,) = (tmp_path / "cache").iterdir()
    index.write_bytes(index.read_bytes()[:-40] if damage is None else damage)
    assert grays(source(path)) == [0, 1, 2, 3]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"cannot index .*x\.tar into .*cache: .*data\.cache_dir"):
        source(shard(tmp_path / "x.tar", range(2)))


def test_processes_may_race_for_it(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", range(50))
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(grays(source(path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [list(range(50))] * 4
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_process_killed_while_it_writes_leaves_nothing_that_looks_valid(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", range(5))
    code = (
        "import os, signal, sys; from pathlib import Path; from msf_faiss.config import WebDatasetData\n"
        "from msf_faiss.data.sources import tar_index\n"
        "tar_index.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "path = Path(sys.argv[1]); config = WebDatasetData(path=path)\n"
        "tar_index.index_tar(path, config, path.parent / 'cache')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".tmp"]
    assert grays(source(path)) == [0, 1, 2, 3, 4]


def test_a_pickled_source_maps_the_index_rather_than_carry_it(tmp_path: Path) -> None:
    opened = source(write(tmp_path / "x.tar", *(m for i in range(3000) for m in sample(i, i % 256))))
    grays(opened, [0])
    pickled = pickle.dumps(opened)
    assert len(pickled) < 1500
    assert grays(pickle.loads(pickled), [2999]) == [2999 % 256]


@pytest.mark.shared_data
def test_real_images(shared_data: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(shared_data / "imagenette224_mini_val.parquet").slice(0, 40).to_pylist()
    write(tmp_path / "x.tar", *((f"{i}.jpg", row["image"]["bytes"]) for i, row in enumerate(rows)))
    assert min(min(image.shape[1:]) for image in source(tmp_path / "x.tar").decode(range(40))) >= 150
