"""Inspections of checkpoints over image files, compared with a simple search image by image."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import SIZE, config_of, embed, files_of, save, target_of, write_images
from galleries import make_gallery, unit
from PIL import Image

from msf_faiss.checkpoint.format import Checkpoint
from msf_faiss.errors import UserError
from msf_faiss.neighbors import inspection as inspection_module
from msf_faiss.neighbors.gallery import open_gallery
from msf_faiss.neighbors.options import InspectOptions
from msf_faiss.neighbors.queries import Queries, embed_queries
from msf_faiss.neighbors.records import Inspection, write_records


def inspect(checkpoint: Checkpoint, *, thumbnails: bool = True, **options: Any) -> Inspection:
    return inspection_module.inspect(checkpoint, InspectOptions(**options), thumbnails=thumbnails)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """40 entries pushed into 32 slots: images 0 to 11 twice, 12 to 19 once; images 20 to 23 are not in the bank."""
    return save(tmp_path_factory.mktemp("run"), config_of(images), [*range(20), *range(20)])


def test_records_equal_brute_force(checkpoint: Checkpoint, images: Path) -> None:
    inspection = inspect(checkpoint, queries=24, k=5)
    state = checkpoint.tensors("bank")
    model, files = target_of(checkpoint.config), files_of(images)
    assert [query.id for query in inspection.queries] == list(range(24))
    matches, chances = [], []  # the sample for the summary is the same 24 images
    for query in inspection.queries:
        similarities = state["embeddings"].double() @ embed(model, files[query.id])
        order = similarities.argsort(descending=True).tolist()
        ids = [int(state["ids"][slot]) for slot in order]
        first = {
            index: order[place] for place, index in reversed(list(enumerate(ids)))
        }  # most similar slot of each image
        best = [index for index in dict.fromkeys(ids) if index != query.id][:5]
        assert [neighbor.id for neighbor in query.neighbors] == best
        assert query.label == query.id // 8
        assert query.name == str(files[query.id])
        for rank, neighbor in enumerate(query.neighbors, start=1):
            assert neighbor.rank == rank
            # embedded here in float64, by the encoder in float32 (about 1e-7 per layer)
            assert neighbor.similarity == pytest.approx(float(similarities[first[neighbor.id]]), abs=1e-5)
            assert neighbor.age == (39 - first[neighbor.id]) % 32
            assert neighbor.name == str(files[neighbor.id])
            assert (neighbor.label, neighbor.class_name) == (neighbor.id // 8, files[neighbor.id].parent.name)
            assert neighbor.matches == (neighbor.id // 8 == query.id // 8)
        if query.id < 20:
            assert query.own.entries == ids.count(query.id)
            assert query.own.similarity == pytest.approx(float(similarities[first[query.id]]), abs=1e-5)
        else:
            assert query.own is None
        matches.append([neighbor.matches for neighbor in query.neighbors])
        others = [index for index in ids if index != query.id]
        chances.append(np.mean([index // 8 == query.id // 8 for index in others]))
    summary = inspection.summary
    assert summary.purity == pytest.approx(np.mean(matches))
    assert summary.purity_by_rank == pytest.approx(np.mean(matches, axis=0))
    assert summary.chance == pytest.approx(np.mean(chances))
    assert summary.age == pytest.approx(np.mean([n.age for query in inspection.queries for n in query.neighbors]))


def test_own_entry_is_reported_however_low_it_ranks() -> None:
    vector = unit(1, 4, seed=0)
    gallery = make_gallery(32, list(range(32)), vectors=torch.cat([-vector, vector.repeat(31, 1)]))
    queries = Queries(np.array([0]), ["0"], torch.zeros(1, 3, 8, 8, dtype=torch.uint8), vector)
    own = inspection_module._own_entry(gallery, queries, 0)
    assert (own.similarity, own.age, own.entries) == (pytest.approx(-1, abs=1e-6), 31, 1)


def test_search_of_the_data_set(checkpoint: Checkpoint, images: Path) -> None:
    inspection = inspect(checkpoint, ids=[3, 23], k=4, searched="dataset")
    model, files = target_of(checkpoint.config), files_of(images)
    every = torch.stack([embed(model, path) for path in files])
    for query in inspection.queries:
        similarities = every @ every[query.id]
        best = [index for index in similarities.argsort(descending=True).tolist() if index != query.id][:4]
        assert [neighbor.id for neighbor in query.neighbors] == best
        assert [neighbor.similarity for neighbor in query.neighbors] == pytest.approx(
            similarities[best].tolist(), abs=1e-5
        )
        assert {neighbor.age for neighbor in query.neighbors} == {None}
        assert (query.own.similarity, query.own.age, query.own.entries) == (pytest.approx(1), None, 1)
    assert inspection.summary.age is None
    assert (inspection.protocol.entries, inspection.protocol.capacity) == (24, None)


def test_queries_do_not_depend_on_each_other(checkpoint: Checkpoint) -> None:
    together = inspect(checkpoint, ids=[0, 9, 21], thumbnails=False).queries
    alone = [inspect(checkpoint, ids=[index], thumbnails=False).queries[0] for index in (0, 9, 21)]
    for one, other in zip(together, alone, strict=True):
        assert [neighbor.id for neighbor in one.neighbors] == [neighbor.id for neighbor in other.neighbors]


def test_thumbnails_are_centre_views(checkpoint: Checkpoint, images: Path) -> None:
    inspection = inspect(checkpoint, ids=[5], k=3)
    files = files_of(images)
    assert inspection.thumbnails.side == SIZE
    assert set(inspection.thumbnails.images) == {neighbor.id for neighbor in inspection.queries[0].neighbors}
    for index, thumbnail in {5: inspection.thumbnails.queries[0], **inspection.thumbnails.images}.items():
        assert thumbnail.tobytes() == Image.open(files[index]).tobytes()


def test_query_file_has_no_label(checkpoint: Checkpoint, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "any\n<i>.bmp"
    Image.open(files_of(images)[4]).save(path)
    inspection = inspect(checkpoint, files=[path], ids=[4], k=20)
    of_file, of_id = inspection.queries
    assert (of_file.id, of_file.name, of_file.label, of_file.own) == (None, str(path), None, None)
    assert {neighbor.matches for neighbor in of_file.neighbors} == {None}
    # the same picture, but the entries of image 4 are not known to be its own
    as_file = [neighbor.id for neighbor in of_file.neighbors]
    assert 4 in as_file
    assert [index for index in as_file if index != 4] == [neighbor.id for neighbor in of_id.neighbors]
    assert (inspection.protocol.selection, inspection.protocol.seed) == ("chosen", None)


def test_k_beyond_the_bank(checkpoint: Checkpoint) -> None:
    inspection = inspect(checkpoint, ids=[0, 23], k=1000)
    assert [len(query.neighbors) for query in inspection.queries] == [19, 20]
    assert inspection.missing_neighbors == 981


def test_bank_with_the_query_only(images: Path, tmp_path: Path) -> None:
    inspection = inspect(save(tmp_path, config_of(images), [6, 6]), ids=[6], k=3)
    assert inspection.queries[0].neighbors == ()
    assert inspection.queries[0].own.entries == 2
    assert (inspection.summary.images, len(inspection.summary.purity_by_rank)) == (24, 1)  # of the other images


@pytest.mark.parametrize("selection", [{"ids": [0]}, {"queries": 2}, {"queries": 2, "worst": True}])
def test_summary_is_of_random_images_whatever_the_queries(checkpoint: Checkpoint, selection: dict[str, Any]) -> None:
    every = inspect(checkpoint, queries=24, k=5, thumbnails=False)
    few = inspect(checkpoint, k=5, thumbnails=False, **selection)
    assert few.summary == every.summary
    assert few.summary.images == 24
    low, high = few.summary.purity_interval
    assert low < few.summary.purity < high
    assert inspect(checkpoint, k=5, sample=7, thumbnails=False).summary.images == 7


def test_empty_bank_is_refused(images: Path, tmp_path: Path) -> None:
    empty = save(tmp_path, config_of(images), [])
    with pytest.raises(
        UserError, match="the bank is empty at step 7; inspect a later checkpoint, or search the training images"
    ):
        inspect(empty)
    assert len(inspect(empty, searched="dataset").queries) == 12


def test_bank_of_other_data_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "only.png")
    overrides = [f"data.path={tmp_path}"]
    with pytest.raises(
        UserError, match=r"its bank refers to .* by number, .*: there were 24 training images, now there are 1"
    ):
        inspect(checkpoint, overrides=overrides)
    inspection = inspect(checkpoint, overrides=overrides, searched="dataset")
    assert inspection.summary.purity is None
    assert inspection.queries[0].neighbors == ()


def test_unlabelled_images_have_no_purity(checkpoint: Checkpoint) -> None:
    inspection = inspect(checkpoint, overrides=["data.labels=none"], k=2, queries=5)
    assert (inspection.summary.purity, inspection.summary.chance) == (None, None)
    assert inspection.summary.purity_by_rank == (None, None)
    assert {query.class_name for query in inspection.queries} == {None}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"ids": [24]}, "there is no training image 24; ids are 0 to 23"),
        ({"ids": [-1]}, "there is no training image -1"),
        ({"files": [Path("nowhere.png")]}, r"nowhere\.png does not exist; name an image file"),
        ({"files": [Path(__file__).parent]}, "neighbors is a folder; name an image file"),
        ({"files": [Path(__file__)]}, r"test_inspect\.py cannot be read as an image"),
        ({"overrides": ["model.dim=3"]}, "model.dim=3: the encoder stays as it was trained"),
        ({"overrides": ["data.path=/nowhere"]}, "/nowhere does not exist"),
    ],
)
def test_user_errors(checkpoint: Checkpoint, options: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        inspect(checkpoint, **options)


@pytest.mark.parametrize("options", [{"k": 0}, {"queries": 0}])
def test_invalid_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        InspectOptions(**options)


def test_unreadable_queries_are_errors_or_left_out(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for index, path in enumerate(files_of(images)[:4]):
        (folder / "a").mkdir(parents=True, exist_ok=True)
        (folder / "a" / f"{index}.png").write_bytes(path.read_bytes() if index != 2 else b"broken")
    run = save(tmp_path / "run", config_of(images), [0, 1, 3], dataset_size=4)
    here = f"data.path={folder}"
    with pytest.raises(UserError, match=r"2\.png: cannot read this image"):
        inspect(run, overrides=[here])
    skipping = [here, "data.unreadable=skip"]
    assert [query.id for query in inspect(run, overrides=skipping).queries] == [0, 1, 3]
    with pytest.raises(UserError, match=r"none of the queries can be read: .*2\.png"):
        inspect(run, overrides=skipping, ids=[2])


def test_diverged_encoder(checkpoint: Checkpoint) -> None:
    gallery = open_gallery(checkpoint, searched="dataset")
    next(gallery.model.target.parameters()).data.fill_(torch.inf)
    with pytest.raises(UserError, match="step-00000007: embeddings of the target encoder are not finite"):
        embed_queries(gallery, [], [0])
    with pytest.raises(UserError, match=r"the embedding of .*0\.png is not finite"):
        assert gallery.bank


def test_write_records(checkpoint: Checkpoint, tmp_path: Path) -> None:
    inspection = inspect(checkpoint, k=3, seed=5, thumbnails=False)
    assert inspection.thumbnails is None
    write_records(inspection, tmp_path / "records.json")
    records = json.loads((tmp_path / "records.json").read_text())
    assert list(records) == ["protocol", "summary", "queries"]
    protocol = records["protocol"]
    assert (protocol["step"], protocol["epoch"], protocol["searched"]) == (7, 1.75, "bank")
    assert (protocol["entries"], protocol["capacity"], protocol["k"], protocol["seed"]) == (32, 32, 3, 5)
    assert (protocol["selection"], protocol["encoder"], protocol["dtype"]) == ("random", "target", "float32")
    assert protocol["data"]["kind"] == "folder"
    assert protocol["view"] == "shorter side 16 px, centre 16 px"
    assert records["queries"][0] == json.loads(json.dumps(dataclasses.asdict(inspection.queries[0])))
    assert set(records["queries"][0]["neighbors"][0]) == {
        "rank",
        "id",
        "name",
        "similarity",
        "age",
        "label",
        "class_name",
        "matches",
    }
