"""`msf-faiss inspect-neighbors` on a run of two steps."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result
from msf_faiss_cli import main as entry
from msf_faiss_cli.inspect_neighbors import command
from PIL import Image

from msf_faiss.config import (
    CheckpointConfig,
    Config,
    DemoData,
    FlatBankConfig,
    ModelConfig,
    NarrowBackbone,
    TrainConfig,
    ViewsConfig,
)
from msf_faiss.neighbors.page_content import Explorer
from msf_faiss.train.trainer import pretrain


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "tiny"
    config = Config(
        data=DemoData(images=40, test_images=10, size=16),
        views=ViewsConfig(size=16),
        model=ModelConfig(backbone=NarrowBackbone(width=8, depths=(1,), strides=(2,)), dim=8),
        bank=FlatBankConfig(capacity=128),
        train=TrainConfig(epochs=2, batch_size=32, device="cpu"),
        checkpoint=CheckpointConfig(every_epochs=1),
    )
    for _ in pretrain(config, path):
        pass
    return path


@pytest.fixture(autouse=True)
def pages(monkeypatch: pytest.MonkeyPatch) -> list[Explorer]:
    """The content of the pages that the command writes; pages have their own tests."""
    written: list[Explorer] = []

    def write_page(explorer: Explorer, path: Path) -> None:
        written.append(explorer)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"page {len(written)}")

    page = ModuleType("page")
    page.write_page = write_page
    monkeypatch.setitem(sys.modules, "msf_faiss.neighbors.page_html", page)
    return written


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_page_is_written_to_the_run(run_dir: Path, pages: list[Explorer]) -> None:
    result = invoke(run_dir)
    page = run_dir / "neighbors" / "step-00000002.html"
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == str(page)
    assert re.search(r"purity [\d.]+% \(95% interval [\d.]+% to [\d.]+%; chance [\d.]+%\) of 40 images", result.stdout)
    assert "bank 50% full (64 entries)" in result.stdout
    assert "embedding and searching 40 random images for the statistics" in result.stderr
    assert invoke(run_dir).exit_code == 0  # replaces the file
    assert page.read_text() == "page 2"
    other = invoke(run_dir, "--source", "dataset").stdout.splitlines()[-1]
    assert other == str(run_dir / "neighbors" / "step-00000002-dataset.html")
    assert page.read_text() == "page 2"
    assert [explorer.protocol.searched for explorer in pages] == ["bank", "bank", "dataset"]
    assert (pages[0].evolution, pages[0].clusters, pages[0].map) == ((), (), None)


def test_all_parts_of_the_page(run_dir: Path, pages: list[Explorer]) -> None:
    parts = ["--evolution", "--clusters", 3, "--map", "pca", "--worst", "--page-images", 20, "--sample", 30]
    result = invoke(run_dir, "--queries", 4, "--k", 3, *parts)
    assert result.exit_code == 0, result.stderr
    (explorer,) = pages
    assert (len(explorer.queries), explorer.order, explorer.statistics.summary.images) == (4, "worst", 30)
    assert [moment.step for moment in explorer.evolution] == [1, 2]
    assert len(explorer.clusters) == 3
    assert len(explorer.map.nodes) == len(explorer.nodes.ids) >= 20
    assert [line.split()[0] for line in result.stderr.splitlines()] == [
        "embedding",
        "searching",
        "computing",
        "collecting",
        "drawing",
    ]
    for query in explorer.queries:
        assert f"#{explorer.nodes.ids[query]}" in result.stdout


def test_worst_queries(run_dir: Path, tmp_path: Path) -> None:
    invoke(run_dir, "--worst", "--queries", 2, "--out", tmp_path / "records.json")
    records = json.loads((tmp_path / "records.json").read_text())
    assert records["protocol"]["selection"] == "worst"
    assert len(records["queries"]) == 2


def test_help_lists_every_option_once() -> None:
    lines = invoke("--help").stdout.splitlines()
    for name in (parameter.opts[0] for parameter in command.params if parameter.name != "run"):
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1, name


def test_table_shows_the_records(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "records.JSON"
    result = invoke(run_dir, "--queries", 3, "--k", 4, "--seed", 1, "--out", out)
    records = json.loads(out.read_text())
    assert result.stdout.splitlines()[-1] == str(out)
    assert not (run_dir / "neighbors" / "records.JSON").exists()
    assert len(records["queries"]) == 3
    for query in records["queries"]:
        assert f"#{query['id']}" in result.stdout
        for neighbor in query["neighbors"]:
            mark = "✓" if neighbor["matches"] else "✗"
            assert f"{mark} {neighbor['similarity']:.3f} {neighbor['class_name']}" in result.stdout
            assert f"#{neighbor['id']}, age {neighbor['age']}" in result.stdout


def test_sheet_of_pictures(run_dir: Path, tmp_path: Path) -> None:
    result = invoke(run_dir, "--query-id", 3, "--query-id", 5, "--source", "dataset", "--out", tmp_path / "sheet.png")
    assert "searched 40 training images" in result.stdout
    assert ", age " not in result.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"


def test_checkpoint_outside_a_run_needs_out(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(run_dir / "checkpoints" / "step-00000002", tmp_path / "copy")
    result = invoke(checkpoint, "--queries", 1)
    assert result.exit_code == 0
    assert "no file written: the checkpoint is not part of a run; name a file with --out" in result.stderr
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_fewer_neighbours_than_k(run_dir: Path, tmp_path: Path) -> None:
    result = invoke(run_dir, "--k", 100, "--queries", 1, "--out", tmp_path / "records.json")
    assert "fewer than 100 neighbours, because there are not more other images" in result.stderr
    assert len(json.loads((tmp_path / "records.json").read_text())["queries"][0]["neighbors"]) in range(32, 40)


def test_query_name_with_control_characters(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31m[red]evil.png"
    Image.new("RGB", (30, 20), "red").save(path)
    result = invoke(run_dir, "--query", path, "--out", tmp_path / "page.html")
    assert "\x1b" not in result.stdout
    assert "[31m[red]evil.png" in result.stdout
    assert "✓" not in result.stdout
    assert "match" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--out", "page.htm"], "the extension must be .html (page)"),
        (["--query", "nowhere.png"], "nowhere.png does not exist; name an image file"),
        (["--query-id", "40"], "there is no training image 40; ids are 0 to 39"),
        (["--set", "data.images=50"], "there were 40 training images, now there are 50"),
        (["--set", "bank.capacity=9"], "the encoder stays as it was trained"),
        (["--queries", "2", "--query-id", "1"], "--queries selects random images"),
        (["--worst", "--query-id", "1"], "--worst selects the queries"),
        (["--out", "x.png", "--evolution"], "--evolution, --clusters and --map need a page"),
        (["--out", "x.json", "--clusters", "2"], "--evolution, --clusters and --map need a page"),
        (["--clusters", "41", "--source", "dataset"], "41 clusters need at least as many images, found 40"),
        (["--clusters", "0"], "--clusters"),
        (["--moments", "1"], "--moments"),
    ],
)
def test_user_errors_exit_with_2(
    run_dir: Path,
    arguments: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["msf-faiss", "inspect-neighbors", str(run_dir), *arguments])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
