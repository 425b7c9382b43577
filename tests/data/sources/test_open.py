from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from msf_faiss.config import DataConfig, DemoData
from msf_faiss.data.sources.open import open_source
from msf_faiss.errors import UserError


def test_the_demo_has_separate_held_out_images() -> None:
    config = DemoData(images=40, test_images=20, size=16)
    train, test = open_source(config, "train"), open_source(config, "test")
    assert train is not None
    assert test is not None
    assert (len(train), len(test)) == (40, 20)
    assert train.classes == test.classes
    assert train.labels is not None
    assert set(np.unique(train.labels)) <= set(range(len(train.classes or ())))
    seen = {image.numpy().tobytes() for image in map(train.decode, range(40))}
    assert len(seen) == 40
    assert not seen & {image.numpy().tobytes() for image in map(test.decode, range(20))}


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "folder", "path": "nowhere"},
        {"kind": "folder", "path": "images", "test_path": "no/where"},
        {"kind": "parquet", "path": "nowhere.parquet"},
        {"kind": "webdataset", "path": "nowhere/train-{0..3}.tar"},
        {"kind": "huggingface", "path": "no/where/at/all"},
        {"kind": "cifar10", "root": "nowhere", "download": False},
    ],
    ids=lambda settings: settings["kind"],
)
def test_missing_relative_path_is_looked_for_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "0.png")
    config = TypeAdapter(DataConfig).validate_python(settings)
    with pytest.raises(UserError, match=rf"where.*Relative paths are looked for in {tmp_path}$"):
        open_source(config, "test" if "test_path" in settings else "train")
    with pytest.raises(UserError) as absolute:
        open_source(TypeAdapter(DataConfig).validate_python({"kind": "folder", "path": tmp_path / "nowhere"}), "train")
    assert "Relative" not in str(absolute.value)
