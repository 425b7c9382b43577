from __future__ import annotations

import errno
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from msf_faiss.config import ParquetData
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.data.sources.open import open_source
from msf_faiss.data.sources.parquet import ParquetSource
from msf_faiss.errors import UserError

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def png(gray: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), gray, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, grays: list[int], labels: Any = None, names: list[str] | None = None, **options: Any) -> Path:
    """A file whose image i is uniformly `grays[i]`."""
    images = [{"bytes": png(gray), "path": f"{gray}.png"} for gray in grays]
    columns = {"image": pa.array(images, IMAGE)} | ({} if labels is None else {"label": pa.array(labels)})
    table = pa.table(columns)
    if names is not None:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3, **options)
    return path


def source(path: Path, **settings: Any) -> ParquetSource:
    return ParquetSource(ParquetData(path=path, **{"cache_dir": path.parent / "cache"} | settings), path)


def grays(opened: Source, ids: list[int]) -> list[int]:
    return [int(image[0, 0, 0]) for image in map(opened.decode, ids)]


def test_single_file(tmp_path: Path) -> None:
    opened = source(write(tmp_path / "set.parquet", list(range(10)), [0, 1] * 5, ["cat", "dog"]))
    assert isinstance(opened, Source)
    assert len(opened) == 10
    assert opened.classes == ("cat", "dog")
    assert opened.labels is not None
    assert opened.labels.tolist() == [0, 1] * 5
    assert grays(opened, [9, 0, 4, 4]) == [9, 0, 4, 4]
    assert opened.decode(1).shape == (3, 4, 5)
    assert opened.name(7) == f"{tmp_path}/set.parquet, row 7 (7.png)"


def test_folder_of_shards(tmp_path: Path) -> None:
    for shard, first in (("b", 10), ("a", 0), ("c", 20)):
        write(tmp_path / f"set/{shard}.parquet", list(range(first, first + 7)), [first // 10] * 7)
    (tmp_path / "set/README.md").touch()
    opened = source(tmp_path / "set")
    assert len(opened) == 21
    assert grays(opened, [0, 6, 7, 13, 14, 20]) == [0, 6, 10, 16, 20, 26]
    assert opened.labels is not None
    assert opened.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert opened.classes == ("0", "1", "2")
    assert opened.name(7) == f"{tmp_path}/set/b.parquet, row 0 (10.png)"


@pytest.mark.parametrize("large", [False, True])
def test_types_of_other_writers(tmp_path: Path, large: bool) -> None:
    image = pa.struct({"path": pa.large_string(), "bytes": pa.large_binary()}) if large else IMAGE
    table = pa.table({"image": pa.array([{"bytes": png(3), "path": None}], image), "label": pa.array([2], pa.uint8())})
    pq.write_table(table.replace_schema_metadata({"class_names": '["a", "b", "c"]'}), tmp_path / "x.parquet")
    opened = source(tmp_path / "x.parquet")
    assert grays(opened, [0]) == [3]
    assert opened.classes == ("a", "b", "c")
    assert opened.name(0) == f"{tmp_path}/x.parquet, row 0"


def test_missing_labels(tmp_path: Path) -> None:
    some = source(write(tmp_path / "some.parquet", [1, 2, 3], [1, None, 0]))
    assert some.labels is not None
    assert some.labels.tolist() == [1, -1, 0]
    for name, labels in {"none": None, "null": pa.array([None] * 3, pa.int64()), "minus": [-1] * 3}.items():
        opened = source(write(tmp_path / f"{name}.parquet", [1, 2, 3], labels))
        assert opened.labels is None
        assert opened.classes is None
    assert source(write(tmp_path / "off.parquet", [1], [0]), label_column=None).labels is None


def test_images_in_separate_files(tmp_path: Path) -> None:
    rows = [{"bytes": None, "path": "images/5.png"}, {"bytes": None, "path": "gone.png"}, None]
    pq.write_table(pa.table({"image": pa.array(rows, IMAGE)}), tmp_path / "x.parquet")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/5.png").write_bytes(png(5))
    opened = source(tmp_path / "x.parquet")
    assert grays(opened, [0]) == [5]
    with pytest.raises(UnreadableImageError, match=r"x\.parquet, row 1 \(gone\.png\): .*No such file"):
        opened.decode(1)
    with pytest.raises(UnreadableImageError, match=r"row 2: .*neither bytes nor a path"):
        opened.decode(2)


@pytest.mark.parametrize(
    "images",
    [
        pa.array([png(1), png(2)], pa.binary()),
        pa.array([png(1), png(2)], pa.large_binary()),
        pa.array([png(1), png(2)], pa.binary_view()),
        pa.array([{"bytes": png(1)}, {"bytes": png(2)}]),
        pa.array(["images/1.png", "images/2.png"]),
        pa.array(["images/1.png", "images/2.png"], pa.large_string()),
        pa.array([{"path": "images/1.png"}, {"path": "images/2.png"}]),
        pa.array([{"bytes": png(1), "path": None}, {"bytes": None, "path": "images/2.png"}], IMAGE),
    ],
    ids=lambda images: str(images.type),
)
def test_columns_of_images(tmp_path: Path, images: pa.Array) -> None:
    (tmp_path / "images").mkdir()
    for gray in (1, 2):
        (tmp_path / f"images/{gray}.png").write_bytes(png(gray))
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    assert grays(source(tmp_path / "x.parquet"), [0, 1]) == [1, 2]


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (pa.array(["dog", "cat", None, "dog"]), ("cat", "dog"), [1, 0, -1, 1]),
        (pa.array(["dog", "cat", None, "dog"], pa.large_string()), ("cat", "dog"), [1, 0, -1, 1]),
        (pa.array(["dog", "cat", None, "dog"]).dictionary_encode(), ("cat", "dog"), [1, 0, -1, 1]),
        (pa.array([True, False, None, True]), ("0", "1"), [1, 0, -1, 1]),
        (pa.array([1.0, 0.0, float("nan"), None]), ("0", "1"), [1, 0, -1, -1]),
        (pa.array([2, 0, None, 1], pa.uint16()), ("0", "1", "2"), [2, 0, -1, 1]),
        (pa.array([2, 0, None, 1]).dictionary_encode(), ("0", "1", "2"), [2, 0, -1, 1]),
        (pa.array(["caf\xe9", "cafe\u0301"] * 2), ("cafe\u0301 ('cafe\\u0301')", "caf\xe9 ('caf\\xe9')"), [1, 0] * 2),
        (pa.nulls(4), None, None),
        (pa.array([None] * 4, pa.string()), None, None),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_columns_of_labels(tmp_path: Path, labels: pa.Array, classes: Any, expected: Any) -> None:
    opened = source(write(tmp_path / "x.parquet", [1, 2, 3, 4], labels))
    assert opened.classes == classes
    assert (None if opened.labels is None else opened.labels.tolist()) == expected


def test_text_labels_of_shards_and_held_out_files(tmp_path: Path) -> None:
    write(tmp_path / "set/1.parquet", [1, 2], ["dog", "hen"])
    write(tmp_path / "set/2.parquet", [3], ["cat"])
    test = write(tmp_path / "test.parquet", [4], ["hen"])
    config = ParquetData(path=tmp_path / "set", test_path=test, cache_dir=tmp_path / "cache")
    train, held_out = open_source(config, "train"), open_source(config, "test")
    assert train is not None
    assert held_out is not None
    assert train.classes == held_out.classes == ("cat", "dog", "hen")
    assert train.labels is not None
    assert held_out.labels is not None
    assert (train.labels.tolist(), held_out.labels.tolist()) == ([1, 2, 0], [2])
    write(test, [4, 5], ["hen", "cow"])
    with pytest.raises(
        UserError, match=r"test\.parquet: column 'label' has label 'cow' in row 1, which is none of the 3"
    ):
        open_source(config, "test")
    named = write(tmp_path / "named.parquet", [1, 2], ["dog", "cat"], ["dog", "cat"])
    assert source(named).classes == ("dog", "cat")


def test_a_zero_byte_in_a_path_is_an_unreadable_image(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a\0.png"]}), tmp_path / "x.parquet")
    with pytest.raises(UnreadableImageError, match=r"row 0 .*embedded null byte"):
        source(tmp_path / "x.parquet").decode(0)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"caf\xe9.png", None])
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(png(7))
    pq.write_table(pa.table({"image": text}), tmp_path / "x.parquet")
    opened = source(tmp_path / "x.parquet")
    assert grays(opened, [0]) == [7]
    assert opened.name(0).endswith(r"row 0 (caf\udce9.png)")
    pq.write_table(pa.table({"image": [png(1)] * 2, "label": text}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"y\.parquet is not a complete Parquet file: .*UTF8"):
        source(tmp_path / "y.parquet")


@pytest.mark.parametrize("problem", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_opened_is_not_incomplete(
    problem: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.parquet", [1], [0])

    def refuse(*_: object) -> None:
        raise OSError(problem, os.strerror(problem))

    monkeypatch.setattr(pq, "read_schema", refuse)
    with pytest.raises(UserError, match=rf"x\.parquet cannot be read: {os.strerror(problem)}; make it readable"):
        source(path)


def test_unreadable_images_name_their_row(tmp_path: Path) -> None:
    rows = [{"bytes": png(1), "path": "a"}, {"bytes": png(2)[:40], "path": "cut.png"}]
    pq.write_table(pa.table({"image": pa.array(rows, IMAGE)}), tmp_path / "x.parquet")
    with pytest.raises(UnreadableImageError, match=r"x\.parquet, row 1 \(cut\.png\): cannot read"):
        source(tmp_path / "x.parquet").decode(1)


def test_a_file_is_unpacked_once_and_again_after_a_change(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [1, 2])
    source(path)
    (first,) = (tmp_path / "cache").iterdir()
    made = first.stat().st_mtime_ns
    assert grays(source(path), [1]) == [2]
    assert first.stat().st_mtime_ns == made
    os.utime(path, ns=(1, 1))
    source(path)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    write(path, [3, 4, 5])
    assert grays(source(path), [1]) == [4]


def test_sources_are_pickled_without_images(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", list(range(200)))
    opened = source(path)
    opened.decode(0)
    pickled = pickle.dumps(opened)
    assert len(pickled) < 2000  # the encoded images have some 15 kB
    assert grays(pickle.loads(pickled), [150]) == [150]


# Unusable files


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.parquet does not exist; set data\.path"):
        source(tmp_path / "gone.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty contains no \*\.parquet files"):
        source(tmp_path / "empty")
    (tmp_path / "text.parquet").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"text\.parquet is not a complete Parquet file: .*; download or write it"):
        source(tmp_path / "text.parquet")
    path = write(tmp_path / "cut.parquet", list(range(100)))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"cut\.parquet is not a complete Parquet file"):
        source(path)
    with pytest.raises(UserError, match=r"none\.parquet contains no rows"):
        source(write(tmp_path / "none.parquet", []))


def test_damage_inside_a_file_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", list(range(100)), compression="gzip", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[200 : len(data) // 2] = bytes(len(data) // 2 - 200)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.parquet is not a complete Parquet file"):
        source(path)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        (
            {"picture": pa.array([{"bytes": b"", "path": ""}], IMAGE)},
            r"'image' must be struct.*missing \(columns: picture\)",
        ),
        ({"image": pa.array([1])}, r"'image' must be struct.*or contain bytes or paths, but is int64"),
        (
            {"photo": pa.array([b"raw"]), "image": pa.array([1])},
            r"but is int64; set data\.image_column to photo",
        ),
        ({"image": pa.array([{"bytes": "text", "path": ""}])}, r"'image' must be struct.*but is struct<bytes: string"),
        ({"image": pa.array([{"pixels": b""}])}, r"'image' must be struct.*but is struct<pixels: binary>"),
        (
            {"image": pa.array([{"bytes": b"", "path": ""}], IMAGE), "label": pa.array([[1]])},
            "integers or text, but is list<",
        ),
        ({"image": pa.array([{"bytes": b"", "path": ""}], IMAGE), "label": pa.array([0.5])}, "has label 0.5 in row 0"),
        ({"image": pa.array([{"bytes": b"", "path": ""}], IMAGE), "label": pa.array([-3])}, "has label -3 in row 0"),
        (
            {"image": pa.array([{"bytes": b"", "path": ""}], IMAGE), "label": pa.array([2**40])},
            "has label 1099511627776 in",
        ),
    ],
)
def test_other_schemas_are_refused(tmp_path: Path, columns: dict[str, Any], complaint: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=rf"x\.parquet.*{complaint}"):
        source(tmp_path / "x.parquet")


def test_a_missing_label_column_is_refused_if_configured(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [1], [0])
    with pytest.raises(UserError, match=r"no column 'fine' \(columns: image, label\); set data\.label_column"):
        source(path, label_column="fine")


def test_labels_without_a_class_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [1, 2], [0, 2], ["cat", "dog"])
    with pytest.raises(UserError, match=r"has label 2 in row 1, but there are 2 classes"):
        source(path)


@pytest.mark.parametrize(
    ("labels", "names", "complaint"),
    [
        (None, None, "'label': missing here, int64 there"),
        (pa.array([1], pa.int32()), ["a", "b"], "'label': int32 here, int64 there"),
        ([1], ["x", "y"], r"classes: \('x', 'y'\) here"),
    ],
)
def test_shards_that_do_not_match_are_refused(tmp_path: Path, labels: Any, names: Any, complaint: str) -> None:
    write(tmp_path / "set/1.parquet", [1], [1], ["a", "b"])
    write(tmp_path / "set/2.parquet", [1], labels, names)
    with pytest.raises(UserError, match=rf"2\.parquet does not match .*1\.parquet: .*{complaint}"):
        source(tmp_path / "set")


def test_held_out_labels_use_the_training_classes(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", [1, 2], [0, 1], ["a", "b"])
    test = write(tmp_path / "test.parquet", [3], [1])  # without class names
    config = ParquetData(path=train, test_path=test, cache_dir=tmp_path / "cache")
    opened = open_source(config, "test")
    assert opened is not None
    assert opened.classes == ("a", "b")
    assert grays(opened, [0]) == [3]
    write(test, [3, 4], [0, 1], ["b", "a"])
    with pytest.raises(UserError, match=r"classes of .*test\.parquet are \['b', 'a'\], but the training images have"):
        open_source(config, "test")
    assert open_source(ParquetData(path=train), "test") is None


@pytest.mark.shared_data
def test_real_images(shared_data: Path, tmp_path: Path) -> None:
    config = ParquetData(path=shared_data / "imagenette224_mini_val.parquet", cache_dir=tmp_path)
    opened = open_source(config, "train")
    assert opened is not None
    assert len(opened) == 300
    assert opened.classes is not None
    assert opened.classes[0] == "tench"
    assert min(min(image.shape[1:]) for image in map(opened.decode, range(0, 300, 30))) >= 150
