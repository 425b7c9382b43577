from pathlib import Path

import pytest

from msf_faiss.config import DemoData, FolderData, ParquetData
from msf_faiss.data.sources.detect import detect_data
from msf_faiss.errors import UserError

LIKE = FolderData(
    path=Path("x"),
    workers=0,
    unreadable="skip",
    unreadable_limit=7,
    max_pixels=9,
    cache_dir=Path("kept"),
    labels="none",
)


@pytest.mark.parametrize(
    ("files", "path", "kind"),
    [
        (["a.parquet"], "a.parquet", "parquet"),
        (["a.PARQUET"], "a.PARQUET", "parquet"),
        (["a.tar"], "a.tar", "webdataset"),
        (["a.tar.gz"], "a.tar.gz", "webdataset"),  # whose source explains that it must not be compressed
        ([], "train-{0000..0146}.tar", "webdataset"),
        (["a-1.tar"], "a-*.tar", "webdataset"),
        ([], "train-{0000..0146}.parquet", "parquet"),
        (["a-1.parquet"], "a-*.parquet", "parquet"),
        (["gl[1]/1.jpg"], "gl[1]", "folder"),
        (["gl[1].parquet"], "gl[1].parquet", "parquet"),
        (["d/1.parquet", "d/README.md"], "d", "parquet"),
        (["d/1.tar"], "d", "webdataset"),
        (["d/state.json", "d/data.arrow"], "d", "huggingface"),
        (["d/dataset_dict.json", "d/train/state.json"], "d", "huggingface"),
        (["d/cats/1.jpg"], "d", "folder"),
        (["d/1.jpg", "d/x/1.parquet"], "d", "folder"),
        (["d/cats/1.jpg", "d/metadata.parquet"], "d", "folder"),
    ],
)
def test_the_kind_follows_from_the_path(tmp_path: Path, files: list[str], path: str, kind: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    found = detect_data(tmp_path / path, LIKE)
    assert (found.kind, found.path) == (kind, tmp_path / path)  # type: ignore[union-attr]
    assert (found.workers, found.unreadable, found.unreadable_limit, found.max_pixels) == (0, "skip", 7, 9)
    assert getattr(found, "cache_dir", None) == (None if kind == "huggingface" else Path("kept"))


def test_settings_of_one_kind_are_not_kept(tmp_path: Path) -> None:
    found = detect_data(tmp_path, LIKE)
    assert isinstance(found, FolderData)
    assert found.labels == "auto"
    (tmp_path / "a.parquet").touch()
    kept = detect_data(tmp_path / "a.parquet", ParquetData(path=Path("x"), test_path=Path("y"), image_column="photo"))
    assert kept == ParquetData(path=tmp_path / "a.parquet")


def test_other_files_and_missing_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match=r"photo\.jpg is neither a Parquet nor a tar file; give a folder"):
        detect_data(tmp_path / "photo.jpg", DemoData())
    for name in ("nowhere", "nowhere.parquet", "nowhere.tar"):
        with pytest.raises(UserError, match=f"{name} does not exist; give a folder"):
            detect_data(tmp_path / name, DemoData())
