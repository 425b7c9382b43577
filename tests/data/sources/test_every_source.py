"""The same images in every format: the same pixels, labels and names."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from msf_faiss.config import Config
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.data.sources.open import open_source
from msf_faiss.data.train_batches import training_batches

FORMS = ("folder", "parquet", "webdataset", "saved", "imagefolder", "parquet folder")
CLASSES = ("ant", "bee")
TURNED = 6  # EXIF orientation: rotate by 90°


def encode(pixels: np.ndarray[Any, Any], format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def images() -> dict[str, bytes]:
    """Encoded images by path: of every kind on which decoders may disagree, and a truncated one."""
    draw = np.random.default_rng(0)

    def noise(*shape: int, top: int = 256, dtype: type = np.uint8) -> np.ndarray[Any, Any]:
        return draw.integers(top, size=shape).astype(dtype)

    exif = Image.Exif()
    exif[0x0112] = TURNED
    good = [
        encode(noise(20, 30, 3), "JPEG", exif=exif),
        encode(noise(24, 21), "PNG"),
        encode(noise(22, 22, top=2**16, dtype=np.uint16), "PNG"),
        encode(noise(25, 20, 4), "PNG"),
        encode(noise(20, 20, 3), "WEBP", lossless=True),
        encode(noise(21, 26, 3), "PNG"),
        encode(noise(26, 21, 3), "JPEG"),
    ]
    endings = ["jpg", "png", "png", "png", "webp", "png", "jpeg", "png"]
    content = [*good, good[1][:60]]
    return {
        f"{CLASSES[i % 8 // 4]}/{i}.{ending}": each
        for i, (ending, each) in enumerate(zip(endings, content, strict=True))
    }


def make(root: Path) -> dict[str, dict[str, Any]]:
    """Write the images in every format; their configs."""
    found = images()
    labels = [CLASSES.index(name.partition("/")[0]) for name in found]
    for name, encoded in found.items():
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(encoded)
    rows = [{"bytes": encoded, "path": name} for name, encoded in found.items()]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    made = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)
    made.save_to_disk(root / "saved")
    table = pa.table(
        {
            "image": pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
            "label": pa.array(labels),
        }
    )
    table = table.replace_schema_metadata({"class_names": json.dumps(CLASSES)})
    (root / "parquet").mkdir()
    pq.write_table(table, root / "parquet" / "one.parquet", row_group_size=3)
    made.to_parquet(root / "parquet folder" / "train-0.parquet")
    (root / "tars").mkdir()
    members = [(name, encoded, label) for (name, encoded), label in zip(found.items(), labels, strict=True)]
    for shard, part in enumerate((members[:3], [], members[3:])):
        with tarfile.open(root / "tars" / f"{shard}.tar", "w") as tar:
            for name, encoded, label in part:
                put(tar, name, encoded)
                put(tar, f"{name.rpartition('.')[0]}.cls", str(label).encode())
    (root / "names.txt").write_text("ant\nbee\n")
    return {
        "folder": {"kind": "folder", "path": root / "folder"},
        "parquet": {"kind": "parquet", "path": root / "parquet"},
        "webdataset": {"kind": "webdataset", "path": root / "tars", "class_names": root / "names.txt"},
        "saved": {"kind": "huggingface", "path": root / "saved"},
        "imagefolder": {"kind": "huggingface", "path": root / "folder"},
        "parquet folder": {"kind": "huggingface", "path": root / "parquet folder"},
    }


def put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    root = tmp_path_factory.mktemp("forms")
    datasets.disable_progress_bars()
    made = make(root)
    yield {name: {**settings, "cache_dir": root / "cache"} for name, settings in made.items()}
    datasets.enable_progress_bars()


@pytest.fixture(params=FORMS)
def settings(request: pytest.FixtureRequest, forms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return forms[request.param]


def config(settings: dict[str, Any], **data: Any) -> Config:
    return Config.model_validate(
        {
            "data": {"workers": 0, "unreadable": "skip", **settings, **data},
            "views": {"size": 16},
            "train": {"batch_size": 4, "device": "cpu"},
        }
    )


def opened(settings: dict[str, Any]) -> Source:
    source = open_source(config(settings).data, "train")
    assert source is not None
    return source


def test_pixels_labels_and_names(settings: dict[str, Any], forms: dict[str, dict[str, Any]]) -> None:
    source, reference = opened(settings), opened(forms["folder"])
    assert isinstance(source, Source)
    assert not source.in_memory
    assert len(source) == 8
    assert source.classes == CLASSES
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert source.labels.flags.writeable  # or torch warns
    assert source.labels.tolist() == [0] * 4 + [1] * 4
    for index in range(7):
        assert torch.equal(source.decode(index), reference.decode(index))
    assert source.decode(0).shape == (3, 30, 20)  # rotated
    for index, name in enumerate(images()):
        assert Path(name).name in source.name(index)
    assert [Path(name).name for name in source.relative_names()] == [Path(name).name for name in images()]


@pytest.mark.parametrize("form", ["parquet", "huggingface"])
@pytest.mark.parametrize("typed", [True, False])
def test_images_without_names_are_known_by_their_sizes(tmp_path: Path, form: str, typed: bool) -> None:
    found = list(images().values())
    rows = pa.array([{"bytes": each, "path": None} for each in found]) if typed else pa.array(found)
    pq.write_table(pa.table({"image": rows}), tmp_path / "train.parquet")
    source = opened({"kind": form, "path": tmp_path, "cache_dir": tmp_path / "cache"})
    assert list(source.relative_names()) == [f"an image of {len(each)} bytes" for each in found]


def test_unreadable_images_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(UnreadableImageError, match=r"7\.png.*: cannot read this image"):
        opened(settings).decode(7)


def test_pickled_sources_are_small_and_decode_the_same(settings: dict[str, Any]) -> None:
    source = opened(settings)
    before = source.decode(3)
    pickled = pickle.dumps(source)
    assert len(pickled) < 7_000
    copy = pickle.loads(pickled)
    assert torch.equal(copy.decode(3), before)
    assert copy.classes == CLASSES
    assert copy.labels.tolist() == source.labels.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["webdataset", "saved"])
def test_batches_do_not_depend_on_workers(form: str, forms: dict[str, dict[str, Any]]) -> None:
    settings = forms[form]

    def pixels(workers: int) -> list[Tensor]:
        batches = training_batches(opened(settings), config(settings, workers=workers))
        with contextlib.closing(batches):
            return [batch.online.pixels for batch in islice(batches, 3)]

    for alone, helped in zip(pixels(0), pixels(1), strict=True):
        assert torch.equal(alone, helped)


@pytest.mark.parametrize("form", ["webdataset", "saved"])
def test_pretrain_from_the_command_line(
    form: str,
    forms: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from msf_faiss_cli.main import main

    tiny = {"data.workers": 0, "data.unreadable": "skip", "train.batch_size": 4, "train.max_steps": 1}
    narrow = {"model.backbone.kind": "narrow", "model.backbone.width": 4, "views.size": 16, "bank.capacity": 16}
    plain = {"train.threads": 1, "train.precision": "float32", "train.device": "cpu", "knn.every_epochs": "null"}
    chosen = {**{f"data.{key}": value for key, value in forms[form].items()}, **tiny, **narrow, **plain}
    flags = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
    monkeypatch.setattr(sys, "argv", ["msf-faiss", "pretrain", "folder", *flags, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, capfd.readouterr().err
    assert "8 images (2 classes, used for monitoring only)" in capfd.readouterr().err


def test_identity_changes_with_the_files(settings: dict[str, Any], tmp_path: Path) -> None:
    known = opened(settings).identity()
    assert opened(settings).identity() == known
    assert len(known) == 64
    copied = tmp_path / "copy"
    shutil.copytree(settings["path"], copied)
    moved = settings | {"path": copied}
    before = opened(moved).identity()
    assert before != known
    if settings["kind"] == "huggingface" and list(copied.rglob("*.p[an]*")):
        return  # `datasets` converts such files and caches the result by its own rules
    changed = next(path for path in sorted(copied.rglob("*")) if path.suffix in (".jpg", ".parquet", ".tar", ".arrow"))
    os.utime(changed, ns=(1, 1))
    assert opened(moved).identity() != before
