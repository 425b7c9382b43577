"""Benchmark scripts measure correctly, on tiny banks. Speed is not tested."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bank
import bank_data
import bank_meters
import bank_rows
import drift
import large_bank

from msf_faiss.bank.scan import SCAN_BANKS

EXACT = ["authors", "torch", "faiss", "flat", "flat bfloat16", "flat torch"]
TINY = ["--dim", "32", "--batch", "32", "--rounds", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace large matrix products, which take seconds."""
    known = dict.fromkeys(("float32", "bfloat16", "int8", "read"), 1e9)
    monkeypatch.setattr(bank, "ceilings", lambda device, batch, dim: known)


def test_exact_rows_have_recall_1_and_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, chart = tmp_path / "bank.json", tmp_path / "bank.png"
    rows = ["--rows", ",".join([*EXACT, "lightly"])]
    files = ["--json", str(report), "--chart", str(chart)]
    bank.main(["--sizes", "2000", "3000", *rows, *TINY, *files, "--markdown"])
    found = json.loads(report.read_text())
    assert {(each["data"], each["size"], each["row"]) for each in found["results"]} == {
        (data, size, row) for data in ("clustered", "hard") for size in (2000, 3000) for row in [*EXACT, "lightly"]
    }
    for each in found["results"]:
        assert each["recall"] == (None if each["row"] == "lightly" else 1.0), each
        assert each["rounds"] == 2
        assert each["step_ms"] > 0
    assert {found["faiss"], found["torch"]} == {bank.faiss.__version__, torch.__version__}
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("\n| flat bfloat16 |") == 4


@pytest.mark.parametrize("row", ["scan bf16", "scan int8", "scan pq", "ivf", "ivf segments=4"])
def test_indexed_rows_are_measured_with_their_index(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pushes, as in a large bank, because a single one would leave no time to build lists."""
    scans: list[str] = []

    def record(kind: str, method: str) -> None:
        scan = getattr(SCAN_BANKS[kind], method)
        monkeypatch.setattr(SCAN_BANKS[kind], method, lambda *arguments: scans.append(kind) or scan(*arguments))

    record("bf16", "_search")
    record("int8", "_scan")
    record("pq", "_scan")
    report = tmp_path / "bank.json"
    options = ["--sizes", "5000", "--data", "clustered", "--fill-batch", "500", "--json", str(report)]
    bank.main(["--rows", f"faiss,{row}", *options, *TINY])
    yardstick, own = json.loads(report.read_text())["results"]
    assert (yardstick["row"], own["row"]) == ("faiss", row)
    assert own["cost_of_faiss"] > 0
    assert 0.5 < own["recall"] <= 1  # wrong slots would find next to nothing
    if row.startswith("ivf"):
        assert own["bank_metrics"]["exact_ratio"] < 0.1
    else:
        assert set(scans) == {row.removeprefix("scan ")}
        assert len(scans) >= 5  # searches of a warm-up and two timed rounds, and two recall checks


def test_authors_row_equals_float64_reference() -> None:
    source = bank_data.Hard(32, seed=1)
    ring = bank_rows.PlainRing(500, 32, torch.float32, torch.device("cpu"))
    ring.write(source.draw(500), 0)
    queries = source.draw(20)
    row = bank_rows.Authors(ring)
    row.push(queries, torch.arange(490, 510), 490)  # wraps around
    assert torch.equal(ring.entries[490:], queries[:10])
    assert torch.equal(ring.entries[:10], queries[10:])
    distances = (queries.double()[:, None] - ring.entries.double()[None]).square().sum(dim=2)  # [B, N]
    nearest = distances.sort(dim=1)
    slots = row.search(queries, 5)
    assert torch.equal(slots, nearest.indices[:, :5])
    # float32 rounding error of 2 - 2 cos: a few 2^-24 times 2
    torch.testing.assert_close(row.mean(slots), nearest.values[:, :5].mean(dim=1).float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["torch", "lightly", "faiss"])
def test_plain_rows_find_the_same_neighbors(name: str) -> None:
    source = bank_data.Clustered(32, seed=1)
    ring = bank_rows.PlainRing(700, 32, torch.float32, torch.device("cpu"))
    ring.write(source.draw(700), 0)
    queries, k = source.draw(20), 1 if name == "lightly" else 5
    slots = bank_rows.PLAIN[name](ring).search(queries, k)
    assert torch.equal(slots, bank_rows.Authors(ring).search(queries, k))


def test_ratios_are_medians_over_rounds() -> None:
    # The ratio of the medians would be 20 / 10, in which a slow round counts more.
    assert bank.median_ratio([10, 90, 20], [10, 30, 2]) == 3


def test_recall_excludes_the_own_entry() -> None:
    found = torch.tensor([[9, 1, 2, 8], [5, 4, 3, 7]])
    exact = torch.tensor([[9, 1, 2, 3], [4, 5, 6, 2]])
    # The first finds 1 and 2 of (1, 2, 3); the second, without its own entry, 4 and 5 of (4, 5, 6).
    assert bank_meters.recall(found, exact, torch.tensor([9, 8]), 3) == pytest.approx(4 / 6)


def test_own_entry_is_the_one_just_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(found: torch.Tensor, exact: torch.Tensor, own: torch.Tensor, k: int) -> float:
        seen.append(torch.equal(exact[:, 0], own))  # nothing is nearer to a vector than itself
        return 1.0

    monkeypatch.setattr(bank, "recall", spy)
    bank.main(["--sizes", "2000", "--data", "hard", "--rows", "flat", *TINY])
    assert seen == [True, True]


def test_groups_fit_into_memory_and_repeat_the_yardsticks() -> None:
    rows = ["authors", "torch", "faiss", "flat", "scan pq", "ivf"]
    sizes = {"": 10.0, "flat": 5.0, "scan pq": 4.0, "ivf": 30.0}
    assert bank.groups_of(rows, sizes, 20) == [
        ["authors", "torch", "faiss", "flat", "scan pq"],
        ["authors", "faiss", "ivf"],  # larger than the budget: in a group alone
    ]
    assert bank.groups_of(rows, sizes, 100) == [rows]


def test_run_in_groups_reports_each_row_once(tmp_path: Path) -> None:
    report = tmp_path / "bank.json"
    rows = ["--rows", "authors,torch,faiss,flat,flat bfloat16"]
    bank.main(["--sizes", "2000", "--data", "hard", *rows, *TINY, "--memory", "0", "--json", str(report)])
    found = {each["row"]: each for each in json.loads(report.read_text())["results"]}
    assert list(found) == ["authors", "torch", "faiss", "flat", "flat bfloat16"]
    assert found["authors"]["group"] == found["flat"]["group"] == 1
    assert found["flat bfloat16"]["group"] == 2
    assert found["flat bfloat16"]["faster_than_authors"] > 0


def test_embeddings_draw_each_row_once(tmp_path: Path) -> None:
    path, report = tmp_path / "images.npy", tmp_path / "bank.json"
    rows = np.random.default_rng(0).standard_normal((3000, 24)).astype(np.float16)
    np.save(path, rows)
    source = bank_data.Embeddings(path, seed=3)
    drawn = torch.cat([source.draw(1000), source.draw(2000)])
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(3000))
    unit = torch.nn.functional.normalize(torch.from_numpy(rows.astype(np.float32)), dim=1)
    assert torch.equal((drawn @ unit.T).argmax(dim=1).sort().values, torch.arange(3000))  # each row once
    with pytest.raises(SystemExit, match="only 3,000 embeddings"):
        source.draw(1)
    arguments = ["--embeddings", str(path), "--rows", "faiss,flat", *TINY[2:]]
    bank.main([*arguments, "--sizes", "2000", "--json", str(report)])
    results = json.loads(report.read_text())["results"]
    assert [(each["data"], each["recall"]) for each in results] == [("images", 1.0), ("images", 1.0)]
    with pytest.raises(SystemExit, match="only 3,000 embeddings"):
        bank.main([*arguments, "--sizes", "2900"])


@pytest.mark.parametrize("arguments", [["--rows", "flat,index"], ["--data", "soft"], ["--sizes", "100"]])
def test_unknown_names_and_tiny_rings_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        bank.main(arguments)


@pytest.mark.parametrize("kind", [bank_data.Clustered, bank_data.Hard])
def test_synthetic_vectors_have_unit_norm_and_depend_on_the_seed(
    kind: type[bank_data.Clustered] | type[bank_data.Hard],
) -> None:
    first, again, other = (kind(48, seed).draw(300) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(300))


def test_clusters_are_tighter_than_super_classes() -> None:
    source = bank_data.Clustered(512, seed=0)
    vectors, labels = source.draw_labelled(8192)
    cosines = (vectors[:1024] @ vectors.T).fill_diagonal_(-1)
    same = labels[:1024, None] == labels
    family = labels[:1024, None] % bank_data.SUPER_CLASSES == labels % bank_data.SUPER_CLASSES
    same.fill_diagonal_(False)
    within, sibling, other = (cosines[which].mean().item() for which in (same, family & ~same, ~family))
    # Centres plus noise of energy .95: 1 / 1.95 within a class, .7 / 1.95 within a super-class (subspaces overlap).
    assert within == pytest.approx(1 / 1.95, abs=0.03)
    assert within > sibling > other + 0.3


def test_peak_extra_includes_freed_memory() -> None:
    device = torch.device("cpu")
    if bank_meters.memory_in_use(device) is None:
        pytest.skip("only Linux tells")
    # Pages count once they are written; a few MiB of the process itself vary.
    assert bank_meters.peak_extra(lambda: torch.ones(16 << 20).sum(), device) == pytest.approx(64 << 20, abs=8 << 20)
    assert bank_meters.peak_extra(lambda: None, device) < 8 << 20


def test_drifting_centres_reach_their_cosine() -> None:
    source = bank_data.Clustered(64, seed=0)
    start = source.centres
    moving = drift.Drift(source, period=1000, cosine=0.3)
    for _ in range(10):
        moving.draw(100)
    torch.testing.assert_close((start * source.centres).sum(dim=1), torch.full((4096,), 0.3))
    torch.testing.assert_close(source.centres.norm(dim=1), torch.ones(4096))


def test_drift_lowers_recall_of_a_frozen_quantiser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "drift.json"
    size = ["--size", "8192", "--dim", "32", "--batch", "64", "--threads", "1", "--checks", "4"]
    drift.main([*size, "--rows", "frozen quantiser", "--cosines", "1", "0.1", "--json", str(report)])
    results = json.loads(report.read_text())["results"]
    assert [(each["cosine"], each["rotation"]) for each in results] == [(c, r) for c in (1, 0.1) for r in (1, 2, 3)]
    still, moved = results[2], results[5]
    assert moved["recall_mean"] < still["recall_mean"]
    assert 0 < still["recall_min"] <= still["recall_mean"] <= 1
    assert "frozen quantiser" in capsys.readouterr().out


def test_frozen_ivf_with_all_lists_probed_is_exact() -> None:
    source = bank_data.Hard(32, seed=0)
    frozen = drift.FrozenIvf(2000, 32, probes=10_000)
    for start in range(0, 2600, 100):  # wraps around after the index is built
        frozen.push(source.draw(100), torch.arange(start, start + 100))
    queries = source.draw(50)
    exact = drift.search_exactly(
        drift.default_engine(torch.device("cpu")),
        queries,
        frozen.state_dict()["embeddings"],
        [(0, 2000)],
        frozen.age,
        6,
    )
    found = frozen.search(queries, 6)
    # 8-bit codes swap near neighbours, of which twice as many are re-ranked. Overwritten entries must not matter.
    assert bank_meters.recall(found.slots, exact.slots, torch.full((50,), -1), 6) > 0.98


def test_large_bank_reports(tmp_path: Path) -> None:
    report = tmp_path / "large.json"
    files = ["--fill-batch", "512", "--json", str(report)]
    large_bank.main(["--size", "4096", "--dim", "32", "--steps", "10", "--threads", "1", *files])
    found = json.loads(report.read_text())
    assert len(found["recalls"]) == 5
    assert min(found["recalls"]) > 0.5
    assert found["bank_metrics"]["exact_ratio"] == 0
    assert found["peak_resident_bytes"] > 4096 * 32 * 2


def test_ceilings_are_measured() -> None:
    found = bank_meters.ceilings(torch.device("cpu"), 32, 32, side=256, block=1 << 20, repeats=1)
    assert set(found) == {"float32", "bfloat16", "int8", "read"}
    assert min(found.values()) > 0
