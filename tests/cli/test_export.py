"""`export`, `embed` and `index` on a finished run, in this process."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from invoking import Invoke
from PIL import Image

from msf_faiss.search.faiss_setup import faiss


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for place in range(6):
        path = tmp_path / "photos" / ("cats", "dogs")[place % 2] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    return tmp_path / "photos"


def test_export(invoke: Invoke, tiny_run: Path, tmp_path: Path) -> None:
    done = invoke("export", tiny_run, "--format", "safetensors", "--encoder", "target", "--out", tmp_path / "mine")
    assert done == (0, f"{tmp_path / 'mine'}\n", "")
    facts = json.loads((tmp_path / "mine" / "msf-faiss.json").read_text())
    assert (facts["encoder"], facts["export_format"], facts["checkpoint"]["step"]) == ("target", "safetensors", 6)
    done = invoke("export", tiny_run, "--format", "timm", "--out", tmp_path / "timm")
    assert (done.code, done.stdout) == (2, "")
    assert "timm does not have this network (narrow ResNet" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "timm").exists()


def test_embed_folder(invoke: Invoke, tiny_run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.parquet"
    done = invoke("embed", tiny_run, "--data", photos, "--out", out, "--normalize")
    assert (done.code, done.stdout) == (0, f"{out}\n"), done.stderr
    assert "embedding 6 images (folder)" in done.stderr
    assert "6 embeddings of 16 dimensions (float32, unit norm), online encoder, backbone, step 6" in done.stderr
    table = pq.read_table(out)
    assert sorted(table["class"].to_pylist()) == ["cats"] * 3 + ["dogs"] * 3
    norms = np.linalg.norm(np.array(table["embedding"].to_pylist()), axis=1)
    assert np.abs(norms - 1).max() < 1e-6
    again = invoke("embed", tiny_run, "--data", photos, "--out", out)
    assert again.code == 2
    assert "already exists" in again.stderr
    assert "embedding" not in again.stderr


def test_embed_held_out_images_and_skip_unreadable_ones(
    invoke: Invoke, tiny_run: Path, photos: Path, tmp_path: Path
) -> None:
    done = invoke("embed", tiny_run, "--split", "test", "--out", tmp_path / "e.npy", "--features", "projector")
    assert done.code == 0, done.stderr
    assert np.load(tmp_path / "e.npy").shape == (20, 64)
    (photos / "cats" / "broken.png").write_text("nonsense")
    skipping = ("--data", photos, "--set", "data.unreadable=skip", "--out", tmp_path / "f.npy")
    assert "skipped 1 unreadable images" in invoke("embed", tiny_run, *skipping).stderr


def test_output_names_need_not_be_utf8(invoke: Invoke, tiny_run: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.npy")
    assert invoke("embed", tiny_run, "--split", "test", "--out", tmp_path / name).code == 0
    assert invoke("index", tiny_run, "--from-bank", "--out", tmp_path / os.fsdecode(b"\xff.faiss")).code == 0
    assert np.load(tmp_path / name).shape == (20, 16)
    assert invoke("export", tiny_run, "--format", "safetensors", "--out", tmp_path / os.fsdecode(b"\xff")).code == 0


def test_index(invoke: Invoke, tiny_run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.faiss"
    done = invoke("index", tiny_run, "--data", photos, "--out", out)
    assert (done.code, done.stdout) == (0, f"{out}\n"), done.stderr
    assert f"faiss.read_index({str(out)!r})" in done.stderr
    assert faiss.read_index(str(out)).ntotal == 6
    bank = tmp_path / "bank.faiss"
    done = invoke("index", tiny_run, "--from-bank", "--kind", "ivf", "--out", bank)
    assert done.code == 0, done.stderr
    assert "40 entries of 64 dimensions, recall@10 100.0% probing 1 of 1 lists" in done.stderr
    assert set(pq.read_table(tmp_path / "bank.faiss.images.parquet")["id"].to_pylist()) <= set(range(48))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["embed", "--out", "e.csv"], "the extension must be .parquet"),
        (["embed", "--data", "x", "--split", "test", "--out", "e.npy"], "give one of them"),
        (["index", "--data", "x", "--split", "test", "--out", "e"], "give one of them"),
        (["embed", "--data", "nowhere", "--out", "e.npy"], "nowhere does not exist; give a folder of images"),
        (["embed", "--set", "bank.k=1", "--out", "e.npy"], "the encoder stays as it was trained"),
        (["index", "--from-bank", "--features", "backbone", "--out", "e"], "leave out --features"),
        (["index", "--from-bank", "--batch-size", "3", "--out", "e"], "leave out --batch-size"),
    ],
)
def test_user_errors_exit_with_2(
    invoke: Invoke,
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(arguments[0], tiny_run, *arguments[1:])
    assert (done.code, done.stdout) == (2, "")
    assert complaint in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
