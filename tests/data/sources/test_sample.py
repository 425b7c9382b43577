"""Warnings of what a data set's images lose in decoding."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiff import RGB, tiff

from msf_faiss.config import FolderData
from msf_faiss.data.sources.open import open_source


def warnings_of(folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.WARNING, "msf_faiss"):
        open_source(FolderData(path=folder), "train")
    return [record.getMessage() for record in caplog.records]


def test_ignored_bands_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        (tmp_path / f"{number}.tif").write_bytes(tiff(np.zeros((4, 4, 4), np.uint8), photometric=RGB, extra=[0]))
    [warning] = warnings_of(tmp_path, caplog)
    assert "only the first 3 bands are used" in warning
    assert str(tmp_path / "0.tif") in warning


@pytest.mark.parametrize(("largest", "warned"), [(4095, True), (65535, False)])
def test_dark_16_bit_images_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, largest: int, warned: bool
) -> None:
    for number in range(3):
        pixels = np.linspace(0, largest, 64).astype(np.uint16).reshape(8, 8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    warnings = warnings_of(tmp_path, caplog)
    assert len(warnings) == warned
    assert not warned or "use only the darkest 6.2 % of their range" in warnings[0]


def test_ordinary_and_unreadable_images_give_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    assert warnings_of(tmp_path, caplog) == []
