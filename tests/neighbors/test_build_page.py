"""Pages of checkpoints over image files, compared with a simple search image by image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import CLASSES, SIZE, config_of, embed, files_of, save, target_of, write_images
from PIL import Image

from msf_faiss.checkpoint.format import Checkpoint, find_checkpoint
from msf_faiss.errors import UserError
from msf_faiss.neighbors.build_page import BuiltPage, build_page
from msf_faiss.neighbors.inspection import inspect
from msf_faiss.neighbors.options import InspectOptions, PageOptions
from msf_faiss.neighbors.page_content import Explorer


def build(checkpoint: Checkpoint, notify: Callable[[str], object] = print, **options: Any) -> BuiltPage:
    return build_page(checkpoint, PageOptions(**options), notify)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The second of two: 40 entries pushed into 32 slots, of images 0 to 19; 20 to 23 are not in the bank."""
    run, config = tmp_path_factory.mktemp("run"), config_of(images)
    save(run, config, [*range(20)], step=3, seed=3)
    return save(run, config, [*range(20), *range(20)], step=7)


def entries_of(checkpoint: Checkpoint, searched: str) -> list[tuple[int, torch.Tensor, int | None]]:
    """(image, vector, age) of each entry of the gallery."""
    if searched == "dataset":
        model = target_of(checkpoint.config)
        return [(index, embed(model, path), None) for index, path in enumerate(files_of(checkpoint.config.data.path))]
    state = checkpoint.tensors("bank")
    return [
        (int(index), vector.double(), (39 - slot) % 32)
        for slot, (index, vector) in enumerate(zip(state["ids"], state["embeddings"], strict=True))
    ]


def nearest(entries: list, query: torch.Tensor, own: int, k: int, among: set[int] | None = None) -> list:
    """(image, similarity, age) of different images, most similar first."""
    best: dict[int, tuple] = {}
    for index, vector, age in entries:
        found = (index, float(vector @ query), age)
        if index != own and (among is None or index in among) and found[1] > best.get(index, (0, -2.0))[1]:
            best[index] = found
    return sorted(best.values(), key=lambda found: -found[1])[:k]


def check_graph(explorer: Explorer, checkpoint: Checkpoint, searched: str, k: int, files: dict[int, Path]) -> None:
    """Compare every row with `nearest`; `files`: by node, of nodes that are not in the training set."""
    model, paths = target_of(checkpoint.config), files_of(checkpoint.config.data.path)
    nodes, graph = explorer.nodes, explorer.graph
    entries = entries_of(checkpoint, searched)
    page = set(nodes.ids.tolist()) - {-1}
    assert (graph.ages is None) == (searched == "dataset")
    for node, index in enumerate(nodes.ids.tolist()):
        path = files[node] if index < 0 else paths[index]
        assert nodes.names[node] == str(path)
        assert nodes.labels[node] == (-1 if index < 0 else index // 8)
        assert nodes.pictures[node].tobytes() == Image.open(path).convert("RGB").tobytes()
        everything = nearest(entries, embed(model, path), index, k)
        expected = everything if graph.complete[node] else nearest(entries, embed(model, path), index, k, page)
        assert graph.complete[node] == ({index for index, _, _ in everything} <= page)
        exists = graph.neighbors[node] >= 0
        assert nodes.ids[graph.neighbors[node][exists]].tolist() == [index for index, _, _ in expected]
        # embedded here in float64, by the encoder in float32 (about 1e-7 per layer)
        assert graph.similarities[node] == pytest.approx([s for _, s, _ in expected] + [0] * (~exists).sum(), abs=1e-5)
        if graph.ages is not None:
            assert graph.ages[node][exists].tolist() == [age for _, _, age in expected]


@pytest.mark.parametrize("searched", ["bank", "dataset"])
@pytest.mark.parametrize("page_images", [1, 13, 100])
def test_graph_equals_brute_force(checkpoint: Checkpoint, tmp_path: Path, searched: str, page_images: int) -> None:
    file = tmp_path / "any\n<i>.bmp"
    Image.open(files_of(checkpoint.config.data.path)[4]).save(file)
    inspection, explorer = build(
        checkpoint, files=[file], ids=[2, 21, 2], k=3, searched=searched, page_images=page_images, sample=6
    )
    assert explorer.queries == (0, 1, 2)
    assert explorer.nodes.ids[:3].tolist() == [-1, 2, 21]
    assert (explorer.order, explorer.classes) == ("chosen", CLASSES)
    check_graph(explorer, checkpoint, searched, 3, {0: file})
    if page_images < 100:
        assert not explorer.graph.complete.all()
    if page_images == 100:
        assert len(explorer.nodes.ids) == (25 if searched == "dataset" else 22)  # 20, the file and 21
        assert explorer.graph.complete.all()
    for query, row in zip(inspection.queries, explorer.graph.neighbors, strict=False):
        assert explorer.nodes.ids[row].tolist() == [neighbor.id for neighbor in query.neighbors]
    assert explorer.statistics.summary.images == (24 if searched == "dataset" else 6)
    assert (explorer.evolution, explorer.clusters, explorer.map) == ((), (), None)


@pytest.mark.parametrize("searched", ["bank", "dataset"])
def test_all_parts_refer_to_nodes(checkpoint: Checkpoint, searched: str) -> None:
    notes: list[str] = []
    _, explorer = build(
        checkpoint,
        queries=2,
        k=4,
        searched=searched,
        page_images=1,
        moments=6,
        clusters=3,
        map_method="pca",
        notify=notes.append,
    )
    images = len(explorer.nodes.ids)
    assert (explorer.order, explorer.protocol.selection, explorer.protocol.seed) == ("random", "random", 0)
    assert [(moment.step, moment.epoch) for moment in explorer.evolution] == [(3, 0.75), (7, 1.75)]
    np.testing.assert_array_equal(explorer.evolution[-1].neighbors, explorer.graph.neighbors[:2])
    np.testing.assert_array_equal(explorer.evolution[-1].similarities, explorer.graph.similarities[:2])
    assert explorer.evolution[0].neighbors.tolist() != explorer.evolution[1].neighbors.tolist()
    everything = 24 if searched == "dataset" else 20
    assert sum(cluster.size for cluster in explorer.clusters) == everything
    assert [cluster.size for cluster in explorer.clusters] == sorted(
        (cluster.size for cluster in explorer.clusters), reverse=True
    )
    named = [member for cluster in explorer.clusters for member in cluster.members]
    assert len(set(named)) == len(named) == sum(min(12, cluster.size) for cluster in explorer.clusters)
    for node, index in enumerate(explorer.nodes.ids.tolist()):
        assert (explorer.cluster_of[node] >= 0) == (index < everything)
    for number, cluster in enumerate(explorer.clusters):
        assert {explorer.cluster_of[member] for member in cluster.members} == {number}
    named += [hub.node for hub in explorer.statistics.hubs]
    named += [node for pair in explorer.pairs for node in pair[:2]] + [node for node, _ in explorer.outliers]
    assert (len(explorer.pairs), len(explorer.outliers)) == (3, 2)  # of 24 images one of ten and one of twenty
    assert 0 <= min(named) <= max(named) < images
    assert explorer.map.nodes.tolist() == list(range(images))
    assert (explorer.map.positions.shape, explorer.map.method) == ((images, 2), "pca")
    assert "searching at step 3" in notes
    assert len({picture.size for picture in explorer.nodes.pictures}) == 1
    check_graph(explorer, checkpoint, searched, 4, {})


@pytest.mark.parametrize("searched", ["bank", "dataset"])
def test_evolution_uses_each_checkpoints_encoder_and_bank(checkpoint: Checkpoint, searched: str) -> None:
    _, explorer = build(checkpoint, ids=[3, 22], k=5, searched=searched, sample=2, moments=2)
    first = checkpoint.path.with_name("step-00000003")
    for path, moment in zip([first, checkpoint.path], explorer.evolution, strict=True):
        expected = inspect(find_checkpoint(path), InspectOptions(ids=[3, 22], k=5, searched=searched), thumbnails=False)
        for query, row, similarities in zip(expected.queries, moment.neighbors, moment.similarities, strict=True):
            assert explorer.nodes.ids[row].tolist() == [neighbor.id for neighbor in query.neighbors]
            assert similarities.tolist() == pytest.approx([neighbor.similarity for neighbor in query.neighbors])


@pytest.mark.parametrize("searched", ["bank", "dataset"])
def test_purity_of_evolution_is_of_the_large_sample(checkpoint: Checkpoint, searched: str) -> None:
    _, explorer = build(checkpoint, ids=[3], k=5, searched=searched, moments=2)
    for step, moment in zip((3, 7), explorer.evolution, strict=True):
        path = checkpoint.path.with_name(f"step-{step:08d}")
        summary = inspect(
            find_checkpoint(path), InspectOptions(queries=1, k=5, searched=searched), thumbnails=False
        ).summary
        assert (moment.images, moment.purity) == (24, summary.purity)
        assert moment.purity_interval == summary.purity_interval


def test_same_seed_gives_the_same_page(checkpoint: Checkpoint) -> None:
    def pages(seed: int) -> tuple:
        _, explorer = build(checkpoint, queries=2, k=2, page_images=12, sample=5, clusters=2, seed=seed)
        return explorer.nodes.ids.tolist(), explorer.clusters, explorer.statistics.similarity.matching.tolist()

    assert pages(0) == pages(0)
    assert pages(0) != pages(1)


def test_worst_queries_come_first(checkpoint: Checkpoint) -> None:
    inspection, explorer = build(checkpoint, queries=24, worst=True, k=4)
    assert (explorer.order, inspection.protocol.selection) == ("worst", "worst")
    shares = [query.matching / 4 for query in inspection.queries]
    assert shares == sorted(shares)
    assert len(shares) == 24
    assert explorer.nodes.ids[list(explorer.queries)].tolist() == [query.id for query in inspection.queries]
    unlabelled = PageOptions(worst=True, overrides=["data.labels=none"])
    for function in (build_page, inspect):
        with pytest.raises(UserError, match="the images have no labels, so none is a worse query"):
            function(checkpoint, unlabelled)
    assert inspect(checkpoint, InspectOptions(queries=24, worst=True, k=4), thumbnails=False) == inspection


def test_page_of_unlabelled_images(checkpoint: Checkpoint) -> None:
    _, explorer = build(checkpoint, queries=2, k=2, overrides=["data.labels=none"], clusters=2, moments=2)
    assert explorer.classes is None
    assert set(explorer.nodes.labels.tolist()) == {-1}
    assert (explorer.statistics.summary.purity, explorer.statistics.purity_by_class) == (None, ())
    assert explorer.statistics.confusion is None
    assert {hub.matching for hub in explorer.statistics.hubs} == {None}
    assert {cluster.classes for cluster in explorer.clusters} == {()}
    assert {moment.purity for moment in explorer.evolution} == {None}


def test_page_of_one_image(checkpoint: Checkpoint, tmp_path: Path) -> None:
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "only.png")
    here = [f"data.path={tmp_path}"]
    _, explorer = build(checkpoint, overrides=here, searched="dataset", clusters=1)
    assert (explorer.graph.neighbors.shape, explorer.queries) == ((1, 0), (0,))
    assert explorer.clusters[0].members == (0,)
    with pytest.raises(UserError, match="--map needs at least 4 images, found 1"):
        build(checkpoint, overrides=here, searched="dataset", map_method="tsne")
    with pytest.raises(UserError, match="2 clusters need at least as many images, found 1"):
        build(checkpoint, overrides=here, searched="dataset", clusters=2)


def test_k_beyond_the_images(checkpoint: Checkpoint) -> None:
    inspection, explorer = build(checkpoint, ids=[0, 23], k=1000)
    assert inspection.missing_neighbors == 981
    assert explorer.graph.neighbors.shape == (21, 20)
    assert (explorer.graph.neighbors[0] >= 0).sum() == 19


def test_image_that_is_no_longer_readable(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    for index, path in enumerate(files_of(images)[:6]):
        (folder / "a" / f"{index}.png").write_bytes(path.read_bytes() if index != 2 else b"broken")
    run = save(tmp_path / "run", config_of(images), [0, 1, 2, 3, 4, 5], dataset_size=6)
    skipping = [f"data.path={folder}", "data.unreadable=skip"]
    with pytest.raises(UserError, match=r"2\.png is in the bank but no longer readable"):
        build(run, ids=[0], overrides=skipping, k=5)
    _, explorer = build(run, overrides=skipping, k=5, searched="dataset")
    assert sorted(explorer.nodes.ids.tolist()) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("options", [{"k": 0}, {"queries": 0}, {"sample": 0}, {"page_images": 0}, {"moments": 1}])
def test_invalid_page_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PageOptions(**options)
