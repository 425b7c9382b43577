from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from msf_faiss.config import HuggingFaceData
from msf_faiss.data.source import UnreadableImageError
from msf_faiss.data.sources.huggingface import HuggingFaceSource
from msf_faiss.data.sources.open import open_source
from msf_faiss.errors import UserError
from msf_faiss.evaluate.comparison import describe_data
from msf_faiss.evaluate.images import has_held_out


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def png(gray: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), gray, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def create(grays: range, names: list[str] | None = None, label: Any = None, image: str = "image") -> Any:
    """A `Dataset` whose image i is uniformly `grays[i]`, with alternating classes."""
    labels = [gray % 2 for gray in grays]
    feature = datasets.ClassLabel(names=names) if names else label
    features = {image: datasets.Image()} | ({} if feature is None else {"label": feature})
    columns = {image: [{"bytes": png(gray), "path": f"{gray}.png"} for gray in grays]}
    columns |= {} if feature is None else {"label": labels}  # type: ignore[dict-item]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def source(path: Path, split: str = "train", **settings: Any) -> HuggingFaceSource:
    return HuggingFaceSource(HuggingFaceData(path=path, split=split, **settings), split)


def grays(opened: HuggingFaceSource) -> list[int]:
    return [int(image[0, 0, 0]) for image in map(opened.decode, range(len(opened)))]


def test_saved_dataset_dict(tmp_path: Path) -> None:
    splits = {"train": create(range(6), ["cat", "dog"]), "test": create(range(10, 13), ["cat", "dog"])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    config = HuggingFaceData(path=tmp_path / "set", test_split="test")
    train, test = open_source(config, "train"), open_source(config, "test")
    assert isinstance(train, HuggingFaceSource)
    assert isinstance(test, HuggingFaceSource)
    assert grays(train) == [0, 1, 2, 3, 4, 5]
    assert grays(test) == [10, 11, 12]
    assert train.classes == test.classes == ("cat", "dog")
    assert test.name(1) == f"{tmp_path}/set, test, row 1 (11.png)"
    assert open_source(HuggingFaceData(path=tmp_path / "set"), "test") is None
    for part, complaint in {
        "validation": "has the splits train, test, and 'validation' is no part of it",
        "train[:x]": "Unrecognized instruction format",
        "train[:101%]": "Percent slice boundaries",
    }.items():
        with pytest.raises(UserError, match=complaint.replace("[", r"\[")):
            source(tmp_path / "set", part)
    assert grays(source(tmp_path / "set", "train[:50%]")) == [0, 1, 2]
    assert grays(source(tmp_path / "set", "train[-1:]+test[1:2]")) == [5, 11]
    with pytest.raises(UserError, match=r"train\[3:2\] contains no rows"):
        source(tmp_path / "set", "train[3:2]")


@pytest.mark.parametrize("form", ["dict", "single", "parquet"])
def test_parts_with_common_rows_are_refused(tmp_path: Path, form: str) -> None:
    made = create(range(10))
    if form == "parquet":
        made.to_parquet(tmp_path / "set/train.parquet")
    else:
        (datasets.DatasetDict({"train": made}) if form == "dict" else made).save_to_disk(tmp_path / "set")
    apart = HuggingFaceData(path=tmp_path / "set", split="train[:80%]", test_split="train[80%:]")
    train, test = open_source(apart, "train"), open_source(apart, "test")
    assert isinstance(train, HuggingFaceSource)
    assert isinstance(test, HuggingFaceSource)
    assert (grays(train), grays(test)) == (list(range(8)), [8, 9])
    for split, test_split in (("train[:80%]", "train[70%:]"), ("train", "train[:1]")):
        config = HuggingFaceData(path=tmp_path / "set", split=split, test_split=test_split)
        with pytest.raises(UserError, match=r"have rows in common, so that held-out images would be trained on"):
            open_source(config, "train")


def test_evaluations_use_test_split() -> None:
    assert not has_held_out(HuggingFaceData(path=Path("a/b")))
    assert not has_held_out(HuggingFaceData(path=Path("a/b"), test_split="train"))
    config = HuggingFaceData(path=Path("a/b"), test_split="test")
    assert has_held_out(config)
    data = {"training_images": 9, "held_out_images": 4, "classes": 2, "commonest_class": 0.5}
    assert describe_data({**data, "config": config.model_dump(mode="json")}).startswith("a/b, test: 4 held-out images")


def test_splits_with_different_classes_are_refused(tmp_path: Path) -> None:
    splits = {"train": create(range(6), ["cat", "dog"]), "test": create(range(4), ["dog", "cat"])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=r"classes of .*set, test are \['dog', 'cat'\], but the training images have"):
        open_source(HuggingFaceData(path=tmp_path / "set", test_split="test"), "test")


def test_saved_dataset_has_no_splits(tmp_path: Path) -> None:
    create(range(3)).save_to_disk(tmp_path / "set")
    assert grays(source(tmp_path / "set")) == [0, 1, 2]
    for config in (
        HuggingFaceData(path=tmp_path / "set", split="test"),
        HuggingFaceData(path=tmp_path / "set", test_split="test"),
    ):
        with pytest.raises(UserError, match="is a single Dataset, whose only split is train, and 'test' is no part"):
            open_source(config, "train" if config.split == "test" else "test")


def test_selected_rows_and_parts_of_a_split(tmp_path: Path) -> None:
    create(range(10)).shuffle(seed=1).select([3, 1, 4]).save_to_disk(tmp_path / "chosen")
    assert len(set(grays(source(tmp_path / "chosen")))) == 3
    create(range(10)).to_parquet(tmp_path / "parquet" / "train.parquet")
    assert grays(source(tmp_path / "parquet", "train[:30%]")) == [0, 1, 2]
    assert grays(source(tmp_path / "parquet", "train[:2]+train[8:]")) == [0, 1, 8, 9]
    with pytest.raises(UserError, match=r"split 'train\[:0\]'.*corresponds to no data"):
        source(tmp_path / "parquet", "train[:0]")
    create(range(0)).save_to_disk(tmp_path / "rowless", num_shards=1)
    with pytest.raises(UserError, match="rowless, train contains no rows; set another split"):
        source(tmp_path / "rowless")


def test_labels(tmp_path: Path) -> None:
    for name, feature in {"int": datasets.Value("int32"), "byte": datasets.Value("uint8")}.items():
        create(range(4), label=feature).save_to_disk(tmp_path / name)
        opened = source(tmp_path / name)
        assert opened.labels is not None
        assert opened.labels.tolist() == [0, 1, 0, 1]
        assert opened.classes == ("0", "1")
    assert source(tmp_path / "int", label_column=None).labels is None
    create(range(4)).save_to_disk(tmp_path / "none")
    assert source(tmp_path / "none").labels is None
    hidden = create(range(4), ["cat", "dog"]).map(lambda row: {"label": -1})
    hidden.save_to_disk(tmp_path / "hidden")
    assert source(tmp_path / "hidden").labels is None
    with pytest.raises(UserError, match=r"none, train has no column 'fine' \(columns: image\); set data\.label_column"):
        source(tmp_path / "none", label_column="fine")
    with pytest.raises(UserError, match=r"column 'image' must contain classes, integers or text, but is Image"):
        source(tmp_path / "none", label_column="image")
    create(range(3)).add_column("label", [0, 5, -7]).save_to_disk(tmp_path / "odd")
    with pytest.raises(UserError, match=r"column 'label' has label -7 in row 2, but there are"):
        source(tmp_path / "odd")


def test_columns_without_the_metadata_of_the_library(tmp_path: Path) -> None:
    """As docs/images.md writes them."""
    (tmp_path / "set").mkdir()
    for gray in (1, 2):
        (tmp_path / f"{gray}.png").write_bytes(png(gray))
    images: dict[str, pa.Array] = {
        "struct": pa.array([{"bytes": png(gray), "path": f"{gray}.png"} for gray in (1, 2)]),
        "bytes": pa.array([png(1), png(2)]),
        "paths": pa.array(["../1.png", "../2.png"]),
        "structs of paths": pa.array([{"bytes": None, "path": f"../{gray}.png"} for gray in (1, 2)]),
    }
    for name, column in images.items():
        table = pa.table({"image": column, "label": ["dog", "cat"]})
        table = table.replace_schema_metadata({"class_names": '["dog", "cat"]'})
        for file in (tmp_path / "set").glob("*.parquet"):
            file.unlink()
        pq.write_table(table, tmp_path / "set" / f"train-{name.replace(' ', '-')}.parquet")
        opened = source(tmp_path / "set")
        assert grays(opened) == [1, 2]
        assert opened.classes == ("cat", "dog")
        assert opened.labels is not None
        assert opened.labels.tolist() == [1, 0]


def test_the_image_column(tmp_path: Path) -> None:
    create(range(3), ["cat", "dog"], image="img").save_to_disk(tmp_path / "set")
    assert grays(source(tmp_path / "set", image_column="img")) == [0, 1, 2]
    with pytest.raises(UserError, match=r"column 'image' does not exist; set data\.image_column to img"):
        source(tmp_path / "set")
    with pytest.raises(
        UserError, match=r"column 'label' contains ClassLabel\(.*not images; set data\.image_column to img"
    ):
        source(tmp_path / "set", image_column="label")
    create(range(3), label=datasets.Value("int64")).remove_columns("image").save_to_disk(tmp_path / "blind")
    with pytest.raises(UserError, match="column 'image' does not exist; columns: label"):
        source(tmp_path / "blind")


def test_unreadable_images_name_their_row(tmp_path: Path) -> None:
    rows = [{"bytes": png(1), "path": None}, {"bytes": b"no image", "path": "bad.png"}, None]
    table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    table.save_to_disk(tmp_path / "set")
    opened = source(tmp_path / "set")
    opened.decode(0)
    for index, text in ((1, r"row 1 \(bad\.png\): .*no known image"), (2, "row 2: .*neither")):
        with pytest.raises(UnreadableImageError, match=text):
            opened.decode(index)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "3.png").write_bytes(png(3))
    opened = source(tmp_path / "folder")
    assert grays(opened) == [3]
    (tmp_path / "folder" / "3.png").unlink()
    with pytest.raises(UnreadableImageError, match=r"row 0 \(.*3\.png\): .*No such file"):
        opened.decode(0)


def test_sources_are_pickled_without_images(tmp_path: Path) -> None:
    create(range(200)).save_to_disk(tmp_path / "set")
    pickled = pickle.dumps(source(tmp_path / "set"))
    assert len(pickled) < 5_000  # the encoded images have some 15 kB
    assert grays(pickle.loads(pickled)) == list(range(200))


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty cannot be opened as a Hugging Face data set.*check data\.path"):
        source(tmp_path / "empty")
    with pytest.raises(UserError, match=r"gone does not exist; set data\.path to a folder, or to a name on the"):
        source(tmp_path / "gone")
    (tmp_path / "x.parquet").touch()
    with pytest.raises(UserError, match=r"x\.parquet is a file; set data\.path to its folder, or for a"):
        source(tmp_path / "x.parquet")
    create(range(3)).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(UserError, match=r"""split 'tset': ValueError: Unknown split "tset"\. Should be one of"""):
        source(tmp_path / "set", "tset")
    with pytest.raises(UserError, match=r"BuilderConfig 'odd' not found.*data\.name"):
        source(tmp_path / "set", name="odd")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"bad cannot be opened as a Hugging Face data set"):
        source(tmp_path / "bad")
    create(range(3)).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(b"")
    with pytest.raises(UserError, match=r"saved cannot be opened as a Hugging Face data set"):
        source(tmp_path / "saved")
    create(range(3)).select([]).save_to_disk(tmp_path / "rowless")
    with pytest.raises(UserError, match="rowless cannot be opened as a Hugging Face data set"):
        source(tmp_path / "rowless")


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"nobody/nothing is not a local folder, and the Hugging Face hub cannot be reached"
    ):
        source(Path("nobody/nothing"))
    calls: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options["split"], options["revision"]))
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"nobody/nothing cannot be opened .*doesn't exist on the Hub"):
        source(Path("nobody/nothing"), "train[:5]", name="small", revision="abc")
    assert calls == [(("nobody/nothing", "small"), "train[:5]", "abc")]
