"""FAISS indexes over a data set and over a bank."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from untrained import save_untrained

from msf_faiss.bank import FlatBank, RingSpec
from msf_faiss.config import Config, DemoData, FlatBankConfig, ModelConfig, NarrowBackbone, TrainConfig, ViewsConfig
from msf_faiss.embeddings import index as embeddings_index
from msf_faiss.embeddings.embedder import open_embedder, write_embeddings
from msf_faiss.embeddings.encoder import load_encoder
from msf_faiss.embeddings.files import images_table
from msf_faiss.embeddings.index import index_bank, index_data, search_snippet
from msf_faiss.errors import UserError
from msf_faiss.search.faiss_setup import faiss

IMAGES, DIM = 120, 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FlatBank]:
    """A run whose bfloat16 bank has wrapped around: 90 entries, two of them of image 5."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    config = Config(
        data=DemoData(images=IMAGES, test_images=10, size=16, workers=0),
        views=ViewsConfig(size=16),
        model=ModelConfig(backbone=NarrowBackbone(width=4, depths=(1,), strides=(2,)), dim=DIM),
        bank=FlatBankConfig(capacity=90, dtype="bfloat16"),
        train=TrainConfig(device="cpu"),
    )
    bank = FlatBank(RingSpec(90, DIM, torch.bfloat16))
    vectors = F.normalize(torch.randn(100, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    bank.push(vectors, torch.cat([torch.arange(20, 119), torch.tensor([5])]))
    bank.push(vectors[:1].roll(1, dims=1), torch.tensor([5]))
    save_untrained(config, run_dir, images=IMAGES, bank=bank)
    return run_dir, bank


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-sq8"])
def test_index_of_images_finds_their_embeddings(run: tuple[Path, FlatBank], tmp_path: Path, kind: Any) -> None:
    out, progress = tmp_path / "i.faiss", []
    embedder = open_embedder(load_encoder(run[0], projector=True))
    facts = index_data(embedder, out, kind=kind, batch_size=50, on_batch=progress.append)
    assert progress == [50, 100, 120]
    write_embeddings(open_embedder(load_encoder(run[0], projector=True)), tmp_path / "e.npy", normalize=True)
    vectors = np.load(tmp_path / "e.npy")
    index = faiss.read_index(str(out))
    assert index.ntotal == facts.entries == IMAGES
    similarities, _ = index.search(vectors[40:43], 1)
    assert np.abs(similarities - 1).max() < (1e-5 if kind != "ivf-sq8" else 0.02)
    if kind == "flat":
        truth = np.argsort(-(vectors @ vectors.T), axis=1, kind="stable")[:, :5]
        found = index.search(vectors, 5)[0]
        # Equal neighbours may come in any order; their similarities may not.
        assert np.abs(found - np.take_along_axis(vectors @ vectors.T, truth, 1)).max() < 1e-5
    rows = pq.read_table(images_table(out))
    assert rows["id"].to_pylist() == list(range(IMAGES))
    assert rows["name"][40].as_py() == embedder.source.name(40)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == "i") == [
        "i.faiss",
        "i.faiss.images.parquet",
    ]
    assert not [path for path in tmp_path.iterdir() if path.name[0] == "."]


def test_index_of_bank_equals_bank_search(run: tuple[Path, FlatBank], tmp_path: Path) -> None:
    out = tmp_path / "bank.faiss"
    facts = index_bank(run[0], out)
    bank = run[1]
    assert (facts.entries, facts.dim, facts.recall) == (90, DIM, None)
    index = faiss.read_index(str(out))
    queries = F.normalize(torch.randn(20, DIM, generator=torch.Generator().manual_seed(1)), dim=1)
    queries = queries.bfloat16().float()  # as the bank rounds them
    expected = bank.search(queries, 6)
    similarities, ids = index.search(queries.numpy(), 6)
    assert (ids == bank.ids(expected.slots).numpy()).all()
    assert np.abs(similarities - expected.similarities.numpy()).max() < 1e-6  # float32 against float64 sums
    rows = pq.read_table(images_table(out))
    assert rows["age"].to_pylist() == list(range(89, -1, -1))
    assert rows["id"].to_pylist()[-2:] == [5, 5]
    newest = bank.reconstruct(bank.newest(1))[0].numpy()
    assert (index.reconstruct(5) == newest).all()


def test_bank_of_other_data_or_empty_is_refused(run: tuple[Path, FlatBank], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"refers to .* by number, but .*: there were 120 training images, now there are 50"
    ):
        index_bank(run[0], tmp_path / "x", overrides=["data.images=50"])
    config = Config(
        data=DemoData(images=10, size=16),
        model=ModelConfig(backbone=NarrowBackbone(width=4, depths=(1,), strides=(2,)), dim=DIM),
        views=ViewsConfig(size=16),
        bank=FlatBankConfig(capacity=9),
    )
    save_untrained(config, tmp_path / "run", images=10, bank=FlatBank(RingSpec(9, DIM)))
    with pytest.raises(UserError, match="the bank is empty; leave out --from-bank to index images"):
        index_bank(tmp_path / "run", tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_existing_files_survive_errors(
    run: tuple[Path, FlatBank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "i.faiss"
    out.write_text("mine")
    for attempt in (lambda: index_bank(run[0], out), lambda: index_data(open_embedder(load_encoder(run[0])), out)):
        with pytest.raises(UserError, match=r"already exists; .*--force"):
            attempt()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embeddings_index, "write_index", full)
    for attempt in (
        lambda: index_bank(run[0], out, force=True),
        lambda: index_data(open_embedder(load_encoder(run[0])), out, force=True),
    ):
        with pytest.raises(UserError, match="cannot write: No space left on device"):
            attempt()
    assert out.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_search_snippet_runs(run: tuple[Path, FlatBank], tmp_path: Path, kind: Any) -> None:
    out = tmp_path / "it's.faiss"
    facts = index_bank(run[0], out, kind=kind)
    names: dict[str, Any] = {"queries": np.eye(DIM, dtype=np.float32)[:3]}
    exec(search_snippet(out, facts), names)
    assert names["ids"].shape == (3, 10)
    assert all(index in names["names"] for index in names["ids"].ravel())
