"""The race trains, evaluates and continues where it was, on few images and without its peers. Speed is not tested."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import race


def write_images(path: Path, count: int) -> None:
    rows = []
    for number in range(count):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 128, (16, 16, 3), dtype=np.uint8) + 100 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": rows, "label": [number % 2 for number in range(count)]}), path)


def test_race_adds_rows_to_those_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "train.parquet", 40)
    write_images(tmp_path / "test.parquet", 20)
    monkeypatch.setattr(race, "BATCH", 16)
    monkeypatch.setattr(race, "evaluate", lambda path, *options: {"20-NN": float((path / "checkpoints").is_dir())})
    out = tmp_path / "race.json"
    arguments = [str(tmp_path / "train.parquet"), str(tmp_path / "test.parquet"), "--out", str(out)]
    for methods in (["untrained"], ["untrained", "msf"]):
        options = ["--methods", *methods, "--minutes", "0.001", "--size", "16", "--config", "cifar10_laptop"]
        monkeypatch.setattr(sys, "argv", ["race.py", *arguments, *options])
        race.main()
    untrained, trained = json.loads(out.read_text())
    assert (untrained["method"], trained["method"]) == ("untrained", "msf")
    assert trained["steps"] == 2
    assert trained["seconds"] > 0
    assert untrained["20-NN"] == trained["20-NN"] == 1
