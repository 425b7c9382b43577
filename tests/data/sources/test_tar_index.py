"""Which files of a tar file form a sample, and where its image is."""

from __future__ import annotations

import gzip
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from tars import grays, png, sample, shard, source, write

from msf_faiss.data.sources import tar_index
from msf_faiss.errors import UserError


def test_samples_are_those_of_the_library(tmp_path: Path) -> None:
    """For files of its writer, with dots and folders in their names."""
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


def test_samples_of_unusual_files(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.tar",
        *[("__meta__/readme", b"?"), ("README", b"no ending"), ("folder/", b"")],
        *[("1.JPG", png(1)), ("1.CLS", b" 4 "), ("1.json", b"{}")],
        *[("2.seg.png", png(99)), ("2.png", png(2)), ("2.cls", b"-1")],
        *[("3.cls", b"3"), ("3.webp", png(98)), ("3.png", png(3))],
        *[("./4.png", png(4))],
        *[("1.png", png(5))],  # the same key later is another sample, as in the library
        format=tarfile.GNU_FORMAT,
    )
    opened = source(path)
    assert grays(opened) == [1, 2, 3, 4, 5]  # png comes before webp in image_keys
    assert opened.labels is not None
    assert opened.labels.tolist() == [4, -1, 3, -1, -1]
    assert opened.classes == ("0", "1", "2", "3", "4")
    assert grays(source(path, image_keys=("seg.png",))) == [99]
    assert grays(source(path, image_keys=(".WEBP", "jpg"))) == [1, 98]
    assert source(path, label_key=None).labels is None
    assert source(path, label_key=None).classes is None


def test_files_of_the_system_are_no_images(tmp_path: Path) -> None:
    junk = ["__MACOSX/1.png", "__MACOSX/._1.png", "._2.png", "@eaDir/1.png/THUMB.png", "a/@eaDir/2.png"]
    opened = source(write(tmp_path / "x.tar", *sample("a/1", 1), *((name, png(9)) for name in junk)))
    assert grays(opened) == [1]
    assert opened.notes == []


@pytest.mark.parametrize("size", [-512, -1024, -(2**60), 2**62])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_impossible_sizes_are_refused(tmp_path: Path, size: int, kind: bytes) -> None:
    """`tarfile` reads a header with a negative size again and again."""
    path = write(tmp_path / "x.tar", *sample(1, 1), *sample(2, 2))
    content = bytearray(path.read_bytes())
    header = tarfile.TarInfo("3.png")
    header.type = kind
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size & (2**96 - 1)).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(content[:1024] + block + content[1024:])
    with pytest.raises(UserError, match=r"x\.tar (is not a complete tar file|cannot be read)"):
        source(path)


def test_file_names_of_any_length_and_bytes(tmp_path: Path) -> None:
    names = ["x" * 180 + "/" + "y" * 90, os.fsdecode(b"caf\xe9"), "日本/\n", "-rf *"]
    path = write(tmp_path / os.fsdecode(b"\xff{}[1] *.tar"), *(m for i, n in enumerate(names) for m in sample(n, i, 0)))
    opened = source(path)
    assert grays(opened) == [0, 1, 2, 3]
    for index in range(4):
        opened.name(index).encode()  # valid UTF-8


@pytest.mark.parametrize("text", [b"cat", b"", b"1.5", b"-2", b"99999999999999999999999", b"7" * 100])
def test_invalid_labels_are_refused(tmp_path: Path, text: bytes) -> None:
    path = write(tmp_path / "x.tar", ("1.png", png(1)), ("1.cls", text))
    with pytest.raises(
        UserError, match=r"x\.tar: 1\.cls contains b'.*' instead of the number of a class.*data\.label_key"
    ):
        source(path)


def test_a_sample_with_two_files_of_one_extension_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.tar contains two files of one sample with the same extension.*1\.PNG"):
        source(write(tmp_path / "x.tar", ("1.png", png(1)), ("1.cls", b"0"), ("1.PNG", png(2))))


def test_compressed_files_are_refused(tmp_path: Path) -> None:
    plain = shard(tmp_path / "x.tar", range(3)).read_bytes()
    (tmp_path / "set").mkdir()
    (tmp_path / "set/x.tar.gz").write_bytes(gzip.compress(plain))
    for path in (tmp_path / "set", tmp_path / "set/x.tar.gz"):
        with pytest.raises(UserError, match=r"x\.tar\.gz is compressed.*unpack it with gunzip"):
            source(path, tmp_path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    content = shard(tmp_path / "x.tar", range(3)).read_bytes()
    end = len(content.rstrip(b"\0"))
    for size in [0, 100, 511, 513, 600, 1023, 1025, 1500, end - 1]:
        path = tmp_path / f"cut{size}.tar"
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"cut{size}\.tar is not a complete tar file: .*; download or write it"):
            source(path)
    assert not list((tmp_path / "cache").glob("*cut*"))


def test_a_missing_end_marker_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "x.tar", ("1.png", b"x" * 512), ("2.png", b"x" * 512))
    os.truncate(path, 2048)
    assert len(source(path)) == 2
    assert "has no end-of-archive marker" in caplog.text


@pytest.mark.parametrize("header", [0, 1, 3])
def test_damaged_headers_are_noticed(tmp_path: Path, header: int) -> None:
    path = write(tmp_path / "x.tar", *((f"{i}.png", b"x" * 512) for i in range(4)))
    content = bytearray(path.read_bytes())
    content[header * 1024 + 10] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tar is not a complete tar file"):
        source(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(os.urandom(5000))
    with pytest.raises(UserError, match=r"x\.tar is not a complete tar file"):
        source(tmp_path / "x.tar")
    path = shard(tmp_path / "y.tar", range(2))
    path.chmod(0)
    if not os.access(path, os.R_OK):
        with pytest.raises(UserError, match=r"y\.tar cannot be read: Permission denied"):
            source(path)


def test_a_shard_is_indexed_once_per_state_and_label_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
