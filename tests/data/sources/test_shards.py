"""Files of a folder or a pattern, splits among them, and paths that the file system will not look at."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from tars import sample
from tars import write as write_tar
from test_parquet import write as write_parquet

from msf_faiss.config import DataConfig, FolderData, HuggingFaceData, ParquetData, WebDatasetData
from msf_faiss.data.sources import shards
from msf_faiss.data.sources.detect import detect_data
from msf_faiss.data.sources.open import names_held_out, open_source
from msf_faiss.data.sources.shards import find_shards
from msf_faiss.errors import UserError


def create(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(path: Path, root: Path, setting: str = "data.path") -> list[str]:
    return [str(file.relative_to(root)) for file in find_shards(path, ".parquet", setting).files]


# -- splits


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (["train-0", "train-1", "test-0"], ["train-0", "train-1"], ["test-0"]),
        (["train-00000-of-00002", "validation-00000-of-00001"], [0], [1]),
        (["train", "val", "test"], [0], [2]),
        (["training_01", "dev_01"], [0], [1]),
        (["imagenet1k-train-0000", "imagenet1k-validation-00"], [0], [1]),
        (["train2017", "val2017"], [0], [1]),
        (["Train", "EVAL"], [0], [1]),
        (["train-0", "extra"], [0], [1]),
        (["train-00000-of-00001", "unlabeled-00000-of-00001"], [0], [1]),
        (["part-0", "part-1", "test"], [0, 1], [2]),
        (["val-set-train-0", "val-set-val-0"], [0], [1]),
        # one split, or none that is known: everything
        (["test-0", "test-1"], [0, 1], [0, 1]),
        (["contest", "constraint", "developer", "retrieval"], [0, 1, 2, 3], [0, 1, 2, 3]),
        (["0000", "0001"], [0, 1], [0, 1]),
        (["cats-00000-of-00001", "dogs-00000-of-00001"], [0, 1], [0, 1]),
    ],
)
def test_splits_of_the_hub_are_told_apart(
    tmp_path: Path, names: list[str], train: list[Any], held_out: list[Any]
) -> None:
    create(tmp_path, *(f"{name}.parquet" for name in names))
    for setting, expected in (("data.path", train), ("data.test_path", held_out)):
        chosen = [f"{names[each] if isinstance(each, int) else each}.parquet" for each in expected]
        assert sorted(found(tmp_path, tmp_path, setting)) == sorted(chosen)
        assert bool(find_shards(tmp_path, ".parquet", setting).notes) == (len(expected) < len(names))


def test_which_split_is_taken_is_said(tmp_path: Path) -> None:
    create(tmp_path, "train-0.parquet", "train-1.parquet", "test-0.parquet", "README.md")
    assert find_shards(tmp_path, ".parquet", "data.path").notes == [
        f"{tmp_path}: uses the files of train (2 files) and leaves out test (1 file); to use others, set data.path to a"
        " pattern such as *-train-*.parquet"
    ]
    create(tmp_path / "none", "test-0.tar", "val-0.tar")
    with pytest.raises(
        UserError, match=r"none contains files of the splits test \(1 file\) and validation.*none for tr"
    ):
        find_shards(tmp_path / "none", ".tar", "data.path")


def test_patterns_may_name_several_splits(tmp_path: Path) -> None:
    create(tmp_path, "train-0.parquet", "test-0.parquet")
    chosen, notes = find_shards(tmp_path / "*.parquet", ".parquet", "data.path")
    assert len(chosen) == 2
    assert notes == [f"{tmp_path}/*.parquet matches files of test (1 file) and train (1 file); all are used"]
    assert find_shards(tmp_path / "train-*.parquet", ".parquet", "data.path") == ([tmp_path / "train-0.parquet"], [])


KINDS = (ParquetData, WebDatasetData)


def make_splits(root: Path, kind: type[ParquetData | WebDatasetData]) -> str:
    """Two training files and one of held-out images, in `root`; their ending."""
    for name, grays in {"train-0": [1, 2], "train-1": [3], "test-0": [4, 5]}.items():
        if kind is ParquetData:
            write_parquet(root / f"{name}.parquet", grays, [0] * len(grays))
        else:
            write_tar(root / f"{name}.tar", *(member for gray in grays for member in sample(gray, gray, 0)))
    return "parquet" if kind is ParquetData else "tar"


@pytest.mark.parametrize("kind", KINDS)
def test_training_takes_the_training_split(
    tmp_path: Path, kind: type[ParquetData | WebDatasetData], caplog: pytest.LogCaptureFixture
) -> None:
    ending = make_splits(tmp_path / "set", kind)
    config = kind(path=tmp_path / "set", cache_dir=tmp_path / "cache")
    for each in (config, detect_data(tmp_path / "set", config)):
        caplog.clear()
        source = open_source(each, "train")
        assert source is not None
        assert len(source) == 3
        assert [record.message for record in caplog.records if "leaves out test (1 file)" in record.message]
    for test_path in (tmp_path / "set", tmp_path / "set" / f"test-0.{ending}", tmp_path / "set" / f"te*.{ending}"):
        both = config.model_copy(update={"test_path": test_path})
        assert names_held_out(both)
        held_out = open_source(both, "test")
        assert held_out is not None
        assert [int(held_out.decode(index)[0, 0, 0]) for index in range(len(held_out))] == [4, 5]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("path", "test_path"), [("*", "test-0"), ("t*", "t[er]*-0"), ("train-{{0..1}}", "train-1")])
def test_held_out_files_among_the_training_files_are_refused(
    tmp_path: Path, kind: type[ParquetData | WebDatasetData], path: str, test_path: str
) -> None:
    ending = make_splits(tmp_path / "set", kind)
    paths = {"path": path.format(), "test_path": test_path}
    config = kind(cache_dir=tmp_path / "cache", **{k: tmp_path / "set" / f"{v}.{ending}" for k, v in paths.items()})
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"data\.test_path .* have images in common.*-\d\.\w+ belongs to both"):
            open_source(config, split)  # type: ignore[arg-type]


def test_a_file_of_two_names_is_one_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set/0.parquet", [1])
    write_parquet(tmp_path / "set/1.parquet", [2])
    os.link(tmp_path / "set/1.parquet", tmp_path / "held-out.parquet")
    config = ParquetData(path=tmp_path / "set", test_path=tmp_path / "held-out.parquet", cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match=r"held-out\.parquet belongs to both"):
        open_source(config, "train")


def test_equal_paths_hold_nothing_out(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [1])
    assert not names_held_out(ParquetData(path=path, test_path=path))
    assert not names_held_out(FolderData(path=tmp_path, test_path=tmp_path / "../" / tmp_path.name))
    assert names_held_out(FolderData(path=tmp_path, test_path=tmp_path / "x"))
    (tmp_path / "loop").symlink_to("loop")
    assert names_held_out(FolderData(path=tmp_path, test_path=tmp_path / "loop"))


# -- patterns


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("gl[1]/train-*.parquet", ["gl[1]/train-0.parquet"]),
        ("gl[1]/train-[0].parquet", ["gl[1]/train-0.parquet"]),
        ("gl[1]/train-{0..0}.parquet", ["gl[1]/train-0.parquet"]),
        ("gl*/train-*.parquet", ["gl1/train-0.parquet", "gl[1]/train-0.parquet"]),
        ("{a}/x-{0,1}.parquet", ["{a}/x-0.parquet", "{a}/x-1.parquet"]),
        ("*/x-?.parquet", ["{a}/x-0.parquet", "{a}/x-1.parquet"]),
        ("*/gl[1]/y.parquet", ["deep/gl[1]/y.parquet"]),
        ("**/y.parquet", ["deep/gl1/y.parquet", "deep/gl[1]/y.parquet"]),
        ("b[2]-*.parquet", ["b[2]-0.parquet"]),
        ("star*.parquet", ["star*.parquet"]),  # a file of this name
        ("gl[1]", ["gl[1]/train-0.parquet"]),
        (".h[i]/*.parquet", [".h[i]/z.parquet"]),
    ],
)
def test_names_that_exist_are_literal(tmp_path: Path, pattern: str, names: list[str]) -> None:
    create(tmp_path, "gl[1]/train-0.parquet", "gl1/train-0.parquet", "{a}/x-0.parquet", "{a}/x-1.parquet")
    create(tmp_path, "deep/gl[1]/y.parquet", "deep/gl1/y.parquet", "b[2]-0.parquet", "star*.parquet", "starry.parquet")
    create(tmp_path, ".h[i]/z.parquet")
    assert found(tmp_path / pattern, tmp_path) == names


def test_relative_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(tmp_path, "train-0.parquet", "gl[1]/train-0.parquet")
    monkeypatch.chdir(tmp_path)
    for pattern in ("train-*.parquet", "./train-[0].parquet", "gl[1]/*.parquet"):
        (file,) = find_shards(Path(pattern), ".parquet", "data.path").files
        assert file.is_file()


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("x-{0..999999999}.tar", "stands for more than 1,000,000 files; correct the numbers in data.path"),
        ("x-{0..9999}{0..9999}.tar", "stands for more than 1,000,000 files"),
        ("{a,b}" * 21 + ".tar", "stands for more than 1,000,000 files"),
        ("x-{0..2.tar", "is not a valid pattern"),
        ("x-{" + ",".join(str(number) for number in range(99)) + "}.tar", r"x-1\.tar \(of .*\) does not exist"),
        ("gone/*.tar", "does not exist; set data.path to a tar file"),
        ("x-0.tar/*.tar", "does not exist; set data.path to a tar file"),
        ("nul\0-*.tar", "does not exist"),
    ],
)
def test_patterns_without_files_are_refused(tmp_path: Path, pattern: str, complaint: str) -> None:
    create(tmp_path, "x-0.tar")
    with pytest.raises(UserError, match=complaint):
        find_shards(tmp_path / pattern, ".tar", "data.path")


def test_files_in_subfolders_are_pointed_out(tmp_path: Path) -> None:
    create(tmp_path, "data/train-0.parquet", "README.md")
    with pytest.raises(UserError, match=r"contains no \*\.parquet files, but its subfolder data does; set data\.path"):
        find_shards(tmp_path, ".parquet", "data.path")


def test_endings_may_be_in_capitals(tmp_path: Path) -> None:
    create(tmp_path, "A.PARQUET", ".hidden.parquet", "b.parquet.crc")
    assert found(tmp_path, tmp_path) == ["A.PARQUET"]


# -- paths that the file system will not look at

CONFIGS: dict[str, type[FolderData | ParquetData | WebDatasetData | HuggingFaceData]] = {
    "folder": FolderData,
    "parquet": ParquetData,
    "webdataset": WebDatasetData,
    "huggingface": HuggingFaceData,
}
BAD = {
    "loop": "Too many levels of symbolic links",
    "x" * 300: "File name too long",
    "loop/deeper.tar": "Too many levels of symbolic links",
    "loop/*.parquet": "Too many levels of symbolic links",
    "loop/gl[1]/{a,b}.tar": "Too many levels of symbolic links",
    "stale": os.strerror(errno.ESTALE),
    "unplugged": os.strerror(errno.ENOTCONN),
    "locked": os.strerror(errno.EACCES),
}


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "loop").symlink_to("loop")
    stat = os.stat
    problems = {"stale": errno.ESTALE, "unplugged": errno.ENOTCONN, "locked": errno.EACCES}

    def look(path: Any, **options: Any) -> os.stat_result:
        if problem := problems.get(Path(os.fsdecode(path)).name if not isinstance(path, int) else ""):
            raise OSError(problem, os.strerror(problem))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", look)
    return tmp_path


@pytest.mark.parametrize("path", BAD)
@pytest.mark.parametrize("kind", CONFIGS)
def test_paths_that_cannot_be_looked_at_are_errors_with_the_reason(kind: str, path: str, bad: Path) -> None:
    config: DataConfig = CONFIGS[kind](path=bad / path)
    with pytest.raises(UserError, match=rf"{bad}.*{BAD[path]}; set data\.path to"):
        open_source(config, "train")


@pytest.mark.parametrize("path", BAD)
@pytest.mark.parametrize("kind", ["folder", "parquet", "webdataset"])
def test_held_out_paths_that_cannot_be_looked_at(kind: str, path: str, bad: Path) -> None:
    (bad / "set").mkdir()
    write_parquet(bad / "set/1.parquet", [1])
    write_tar(bad / "set/1.tar", *sample(1, 1))
    (bad / "set/1.png").touch()
    config: Any = CONFIGS[kind](path=bad / "set", test_path=bad / path, cache_dir=bad / "cache")
    assert open_source(config, "train") is not None
    with pytest.raises(UserError, match=rf"{bad}.*{BAD[path]}; set data\.test_path to"):
        open_source(config, "test")


@pytest.mark.parametrize("path", BAD)
def test_the_kind_of_data_at_such_paths_is_not_guessed(path: str, bad: Path) -> None:
    with pytest.raises(UserError, match=rf"{bad}.*{BAD[path]}; give a folder of images"):
        detect_data(bad / path, FolderData(path=Path("x")))


def test_folders_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", refuse)
    for path in (tmp_path, tmp_path / "*.tar"):
        with pytest.raises(UserError, match=rf"{tmp_path} cannot be read: Permission denied; set data\.path to a tar"):
            find_shards(path, ".tar", "data.path")
    with pytest.raises(UserError, match="cannot be read: Permission denied; give a folder"):
        detect_data(tmp_path, FolderData(path=Path("x")))


def test_a_long_pattern_is_no_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number:03d}" for number in range(90)]
    create(tmp_path, *(f"{name}.tar" for name in names))
    pattern = tmp_path / f"{{{','.join(names)}}}.tar"
    assert len(pattern.name) > 255
    assert len(find_shards(pattern, ".tar", "data.path").files) == 90
    assert detect_data(pattern, FolderData(path=Path("x"))).kind == "webdataset"  # type: ignore[union-attr]
    assert shards.is_pattern(pattern)
