"""Files of embeddings: correct rows and names, and no file after an error."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from untrained import save_untrained

from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.checkpoint.load import load_model
from msf_faiss.config import Config, DemoData, FlatBankConfig, ModelConfig, NarrowBackbone, TrainConfig, ViewsConfig
from msf_faiss.embeddings import files as embedding_files
from msf_faiss.embeddings.embedder import Embedder, embed, open_embedder, write_embeddings
from msf_faiss.embeddings.encoder import load_encoder
from msf_faiss.embeddings.extract import extract
from msf_faiss.embeddings.files import METADATA_KEY, images_table
from msf_faiss.errors import UserError

HOSTILE = ["plain.png", "a|b\n.png", "ünï 'quoted\".png", os.fsdecode(b"not-utf8-\xff.png"), "<b>.png"]
SLACK = 1e-5
"""float32 rounding of a few layers: other batch sizes add in another order."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    config = Config(
        data=DemoData(images=37, test_images=11, size=16, workers=0),
        views=ViewsConfig(size=16),
        model=ModelConfig(backbone=NarrowBackbone(width=4, depths=(1,), strides=(2,)), dim=8),
        bank=FlatBankConfig(capacity=20),
        train=TrainConfig(device="cpu"),
    )
    save_untrained(config, run_dir, images=37)
    return run_dir


def photos(folder: Path) -> Path:
    """Five images in two classes, with names that break careless programs."""
    rng = np.random.default_rng(0)
    for place, name in enumerate(HOSTILE):
        path = folder / ("cats", os.fsdecode(b"d\xe9gs"))[place % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path, "PNG")
    return folder


def expected(embedder: Embedder, layer: str, name: str) -> torch.Tensor:
    """All embeddings [N, F], in one batch."""
    encoder: Any = getattr(load_model(embedder.encoder.checkpoint, torch.device("cpu")), name)
    network: nn.Module = encoder if layer == "projector" else encoder.backbone
    return extract(network, embedder.source, config=embedder.config, device=torch.device("cpu")).embeddings


@pytest.mark.parametrize("name", ["online", "target"])
@pytest.mark.parametrize(("layer", "dim"), [("backbone", 4), ("projector", 8)])
def test_parquet(run: Path, tmp_path: Path, name: Any, layer: Any, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_files, "_ROW_GROUP_BYTES", 10 * 4 * dim)  # ten rows
    embedder = open_embedder(load_encoder(run, name, projector=layer == "projector"))
    out, progress = tmp_path / "new" / "e.parquet", []
    assert write_embeddings(embedder, out, batch_size=4, on_batch=progress.append) == 37
    assert progress == [*range(4, 37, 4), 37]
    assert pq.read_metadata(out).num_row_groups == 4  # 12 rows each: batches are not split
    table = pq.read_table(out)
    assert table.column_names == ["id", "name", "label", "class", "embedding"]
    assert table["id"].to_pylist() == list(range(37))
    assert table["name"].to_pylist() == [embedder.source.name(index) for index in range(37)]
    assert embedder.source.labels is not None
    assert embedder.source.classes is not None
    assert table["label"].to_pylist() == embedder.source.labels.tolist()
    assert table["class"].to_pylist() == [embedder.source.classes[label] for label in embedder.source.labels]
    assert str(table.schema.field("embedding").type) == f"fixed_size_list<element: float not null>[{dim}]"
    found = torch.tensor(table["embedding"].to_pylist())
    torch.testing.assert_close(found, expected(embedder, layer, name), rtol=SLACK, atol=SLACK)
    metadata = json.loads(table.schema.metadata[METADATA_KEY])
    assert [metadata[key] for key in ("encoder", "features", "dimensions", "normalized")] == [name, layer, dim, False]
    assert metadata["model_sha256"] == find_checkpoint(run).files["model.safetensors"]
    assert metadata["view"]["center_crop"] == 16


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_npy(run: Path, tmp_path: Path, dtype: Any) -> None:
    embedder = open_embedder(load_encoder(run), split="test")
    out = tmp_path / "e.npy"
    assert write_embeddings(embedder, out, normalize=True, dtype=dtype, batch_size=5) == 11
    array = np.load(out)
    assert (array.shape, array.dtype) == ((11, 4), np.dtype(dtype))
    whole = F.normalize(expected(embedder, "backbone", "online"), dim=1).numpy()
    assert np.abs(array - whole).max() <= (SLACK if dtype == "float32" else 2**-11)  # half a unit of float16 below 1
    rows = pq.read_table(images_table(out))
    assert rows.column_names == ["id", "name", "label", "class"]
    assert rows["id"].to_pylist() == list(range(11))
    assert json.loads(rows.schema.metadata[METADATA_KEY])["dtype"] == dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npy", "e.npy.images.parquet"]


def test_embed_returns_what_write_embeddings_writes(run: Path, tmp_path: Path) -> None:
    encoder = load_encoder(run)
    features = embed(encoder, split="test", normalize=True, batch_size=4)
    assert features.labels is not None
    assert features.ids.tolist() == list(range(11))
    assert embed(encoder, split="test", normalize=True, batch_size=4, out=tmp_path / "e.npy") == 11
    assert np.array_equal(np.load(tmp_path / "e.npy"), features.embeddings.numpy())
    assert pq.read_table(images_table(tmp_path / "e.npy"))["label"].to_pylist() == features.labels.tolist()


def test_embed_of_a_list_of_images_equals_embed_of_their_folder(run: Path, tmp_path: Path) -> None:
    folder, encoder = photos(tmp_path / "photos"), load_encoder(run, projector=True)
    whole = embed(encoder, str(folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    single = embed(encoder, files, batch_size=2)
    torch.testing.assert_close(single.embeddings, whole.embeddings, rtol=SLACK, atol=SLACK)
    assert (single.labels, single.ids.tolist()) == (None, [0, 1, 2, 3, 4])
    assert embed(encoder, []).embeddings.shape == (0, 8)
    with pytest.raises(ValueError, match="only the embeddings of a data set can be written"):
        embed(encoder, files, out=tmp_path / "e.npy")  # type: ignore[call-overload]


def test_hostile_names_and_half_precision(run: Path, tmp_path: Path) -> None:
    embedder = open_embedder(load_encoder(run), data=photos(tmp_path / os.fsdecode(b"ph\xffotos")))
    out = tmp_path / os.fsdecode(b"\xfe.parquet")
    assert write_embeddings(embedder, out, dtype="float16") == 5
    with out.open("rb") as file:
        table = pq.read_table(file)
    names = [Path(name).name for name in table["name"].to_pylist()]
    assert sorted(names) == sorted(name.encode(errors="backslashreplace").decode() for name in HOSTILE)
    assert set(table["class"].to_pylist()) == {"cats", "d\\udce9gs"}
    assert "halffloat" in str(table.schema.field("embedding").type)


def test_unlabelled_images_have_no_label_columns(run: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    embedder = open_embedder(load_encoder(run), data=folder, overrides=["data.labels=none"])
    write_embeddings(embedder, tmp_path / "e.parquet")
    assert pq.read_table(tmp_path / "e.parquet").column_names == ["id", "name", "embedding"]


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_unreadable_images_are_errors_or_skipped(run: Path, tmp_path: Path, ending: str) -> None:
    folder = photos(tmp_path / "photos")
    (folder / "cats" / "broken.png").write_bytes(b"nonsense")
    out = tmp_path / f"e{ending}"
    with pytest.raises(UserError, match=r"broken\.png.*data\.unreadable=skip"):
        write_embeddings(open_embedder(load_encoder(run), data=folder), out)
    assert list(tmp_path.iterdir()) == [folder]
    embedder = open_embedder(load_encoder(run), data=folder, overrides=["data.unreadable=skip"])
    assert write_embeddings(embedder, out, batch_size=2) == 5
    rows = pq.read_table(out if ending == ".parquet" else images_table(out))
    assert len(rows) == 5
    broken = next(index for index in range(6) if "broken" in embedder.source.name(index))
    assert rows["id"].to_pylist() == [index for index in range(6) if index != broken]
    if ending == ".npy":
        assert np.load(out).shape == (5, 4)


def test_existing_files_are_replaced_only_by_force(run: Path, tmp_path: Path) -> None:
    embedder = open_embedder(load_encoder(run), split="test")
    for name, other in (("e.parquet", "e.parquet"), ("f.npy", "f.npy"), ("g.npy", "g.npy.images.parquet")):
        (tmp_path / other).write_text("mine")
        with pytest.raises(UserError, match=r"already exists; .*--force"):
            write_embeddings(embedder, tmp_path / name)
        assert (tmp_path / other).read_text() == "mine"
        write_embeddings(embedder, tmp_path / name, force=True)
    assert len(np.load(tmp_path / "g.npy")) == len(pq.read_table(tmp_path / "e.parquet")) == 11
    (tmp_path / "h.npy").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        write_embeddings(embedder, tmp_path / "h.npy", force=True)
    with pytest.raises(UserError, match=r"must be \.parquet \(a table\) or \.npy \(an array\)"):
        write_embeddings(embedder, tmp_path / "e.csv")


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
@pytest.mark.parametrize("written", [0, 9])
def test_full_disk(run: Path, tmp_path: Path, ending: str, written: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full from the start, or after some writes."""
    opened = Path.open

    class Full:
        def __init__(self, path: Path, mode: str) -> None:
            self._file = opened(path, mode)
            self._left = written

        def write(self, content: Any) -> int:
            self._left -= 1
            if self._left < 0:
                raise OSError(28, "No space left on device")
            return self._file.write(content)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

    old = tmp_path / f"e{ending}"
    old.write_text("old")
    embedder = open_embedder(load_encoder(run))

    def open_full(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return Full(path, mode) if mode == "wb" else opened(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(UserError, match="cannot write: No space left on device; free some space"):
        write_embeddings(embedder, old, batch_size=2, force=True)
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_output_folder_cannot_be_created(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write: (Not a directory|File exists)"):
        write_embeddings(open_embedder(load_encoder(run)), tmp_path / "file" / "e.npy")


def test_embeddings_that_are_not_finite_are_refused(run: Path, tmp_path: Path) -> None:
    embedder = open_embedder(load_encoder(run))
    with torch.no_grad():
        next(embedder.encoder.network.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"embedding of .* is not finite: training has diverged"):
        write_embeddings(embedder, tmp_path / "e.npy")
    embedder = open_embedder(load_encoder(run))
    with torch.no_grad():
        for parameter in embedder.encoder.network.parameters():
            parameter *= 1e4
    with pytest.raises(UserError, match=r"exceed 65,504.*leave out --dtype"):
        write_embeddings(embedder, tmp_path / "e.npy", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_override_and_data_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--set model\.dim=3: the encoder stays as it was trained"):
        open_embedder(load_encoder(run), overrides=["model.dim=3"])
    folder = photos(tmp_path / "photos")
    with pytest.raises(UserError, match=r"names no held-out images; .*--data"):
        open_embedder(load_encoder(run), split="test", overrides=["data.kind=folder", f"data.path={folder}"])
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="does not exist"):
        open_embedder(load_encoder(run), data=folder)
