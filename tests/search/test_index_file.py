"""Index files that FAISS alone reads: ids, exactness, recall."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from msf_faiss.search.faiss_setup import faiss
from msf_faiss.search.index_file import IndexKind, list_count, write_index

DIM = 16


def vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Return unit vectors around twenty centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(20, DIM))
    found = centres[rng.integers(20, size=count)] + 0.4 * rng.normal(size=(count, DIM))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def exact(queries: NDArray[np.float32], base: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the rows [Q, k] of a full sort in float64."""
    return np.argsort(-(queries.astype(np.float64) @ base.astype(np.float64).T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-sq8"])
def test_faiss_reads_index_and_returns_ids(tmp_path: Path, kind: IndexKind) -> None:
    base, queries = vectors(3000), vectors(50, seed=1)
    ids = np.random.default_rng(2).permutation(10_000)[:3000].astype(np.int64)
    facts = write_index(tmp_path / "x.faiss", base, ids, kind=kind)
    index = faiss.read_index(str(tmp_path / "x.faiss"))
    assert (index.ntotal, index.d, index.metric_type) == (3000, DIM, faiss.METRIC_INNER_PRODUCT)
    assert (facts.entries, facts.dim) == (3000, DIM)
    similarities, found = index.search(queries, 10)
    truth = exact(queries, base, 10)
    hits = np.mean([len(set(a) & set(ids[b])) / 10 for a, b in zip(found, truth, strict=True)])
    # 8-bit codes change a component by up to 1/255 of its range, which swaps close neighbours.
    assert hits == 1 if kind == "flat" else hits > (0.93 if kind == "ivf" else 0.85)
    near = 1e-6 if kind != "ivf-sq8" else 0.02
    expected = np.take_along_axis(queries @ base.T, truth, 1)
    assert np.abs(similarities[:, 0] - expected[:, 0]).max() <= near or kind != "flat"
    assert np.abs(index.reconstruct(int(ids[7])) - base[7]).max() <= near
    if kind == "flat":
        assert (facts.lists, facts.probes, facts.recall) == (None, None, None)
    else:
        lists = faiss.extract_index_ivf(index)
        assert (lists.nlist, lists.nprobe) == (facts.lists, facts.probes) == (list_count(3000), facts.probes)
        assert facts.recall is not None
        assert abs(facts.recall - hits) < 0.1


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-sq8"])
def test_what_faiss_can_do_with_a_written_index(tmp_path: Path, kind: IndexKind) -> None:
    """The table of docs/exporting.md."""
    base, ids = vectors(3000), 7 + 3 * np.arange(3000)
    write_index(tmp_path / "x.faiss", base, ids, kind=kind)

    def read() -> Any:
        return faiss.read_index(str(tmp_path / "x.faiss"))

    def search(index: Any, **options: object) -> NDArray[np.int64]:
        parameters = faiss.SearchParameters if kind == "flat" else partial(faiss.SearchParametersIVF, nprobe=76)
        found: NDArray[np.int64] = index.search(base[:20], 5, params=parameters(**options))[1]
        return found

    index = read()
    first = search(index)
    assert first[:, 0].tolist() == ids[:20].tolist()
    limits, _, inside = index.range_search(base[:1], 0.99)
    assert limits.tolist() == [0, len(inside)]
    assert ids[0] in inside
    # An id can be left out of a search of every kind.
    others = search(index, sel=faiss.IDSelectorNot(faiss.IDSelectorBatch(ids[:20])))
    assert not np.isin(others, ids[:20]).any()
    index.add_with_ids(base[:1], np.array([10**6]))
    assert index.ntotal == 3001
    assert 10**6 in search(index)[0]
    assert np.abs(index.reconstruct(10**6) - base[0]).max() <= 0.02
    index, other = read(), read()
    if kind == "flat":
        assert index.remove_ids(ids[:20]) == 20
        assert np.array_equal(search(index), others)
        index.merge_from(other)
        assert index.ntotal == 5980
    else:
        with pytest.raises(RuntimeError, match="remove not supported"):
            index.remove_ids(ids[:20])
        with pytest.raises(RuntimeError, match="merge direct_map not implemented"):
            index.merge_from(other)
        assert np.array_equal(search(index), first)


def test_same_seed_writes_same_file(tmp_path: Path) -> None:
    ids = np.arange(800)
    one, two, other = (tmp_path / name for name in "abc")
    for path, seed in ((one, 0), (two, 0), (other, 5)):
        write_index(path, vectors(800), ids, kind="ivf", seed=seed)
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-sq8"])
@pytest.mark.parametrize("count", [1, 2, 38, 39, 40, 78])
def test_few_vectors(tmp_path: Path, kind: IndexKind, count: int, capfd: pytest.CaptureFixture[str]) -> None:
    base = vectors(count)
    write_index(tmp_path / "x", base, np.arange(count) + 5, kind=kind)
    found = faiss.read_index(str(tmp_path / "x")).search(base, 1)[1][:, 0]
    assert found.tolist() == list(range(5, count + 5))
    assert capfd.readouterr().err == ""  # FAISS warns of few vectors to train with


def test_memory_map_with_duplicates(tmp_path: Path) -> None:
    base = np.repeat(vectors(30), 4, axis=0)
    np.save(tmp_path / "x.npy", base)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    write_index(tmp_path / "x", mapped, np.repeat(np.arange(30), 4), kind="flat")
    index = faiss.read_index(str(tmp_path / "x"))
    assert (index.search(base, 4)[1] == np.repeat(np.arange(30), 4)[:, None]).all()


def test_list_counts() -> None:
    assert [list_count(count) for count in (1, 77, 78, 10_000, 1_000_000)] == [1, 1, 2, 256, 4000]


def test_no_vectors_and_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one vector"):
        write_index(tmp_path / "x", vectors(0), np.arange(0))
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left"):
            write_index(Path("/dev/full"), vectors(5000), np.arange(5000))
