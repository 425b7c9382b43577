"""`msf-faiss report` on a run of two steps."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from msf_faiss_cli import main as entry
from msf_faiss_cli.report import command
from PIL import Image

from msf_faiss.config import Config, FlatBankConfig, FolderData, ModelConfig, NarrowBackbone, TrainConfig, ViewsConfig
from msf_faiss.run.directory import lock_run
from msf_faiss.run.recorder import Recorder
from msf_faiss.train.trainer import pretrain


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images`, in two classes, and the run `tiny`."""
    folder = tmp_path_factory.mktemp("runs")
    for place in range(24):
        path = folder / "images" / ("dark", "light")[place % 2] / f"{place:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (place * 4 + 128 * (place % 2),) * 3).save(path)
    config = Config(
        data=FolderData(path=str(folder / "images")),
        views=ViewsConfig(size=16),
        model=ModelConfig(backbone=NarrowBackbone(width=8, depths=(1,), strides=(2,)), dim=8),
        bank=FlatBankConfig(capacity=64),
        train=TrainConfig(epochs=2, batch_size=12, max_steps=2, log_every=1, device="cpu"),
    )
    with Recorder(folder / "tiny") as record:
        for report in pretrain(config, folder / "tiny"):
            record(report)
    return folder


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained / "tiny", tmp_path / "tiny")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_report_is_written_to_run_and_its_path_to_stdout(run_dir: Path) -> None:
    result = invoke(run_dir)
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert result.exit_code == 0
    assert (result.stdout, result.stderr) == (f"{run_dir / 'report.html'}\n", "")
    assert page.startswith("<!doctype html>")
    assert page.count('alt="Query: ') == 6
    assert page.count('alt="Neighbour ') == 6 * 8
    assert "Retrieved from the bank at step 2 (24 entries)." in page
    assert re.search(
        r"[\d.]+% of the neighbours of 24 images have the class of their query "  # not of the 6 queries shown
        r"\(95% interval: [\d.]+% to [\d.]+%; chance: [\d.]+%\)\.",
        page,
    )
    assert 'title="' + str(run_dir.parent) not in page
    assert invoke(run_dir).exit_code == 0  # replaces the older one
    (run_dir / "checkpoints").rename(run_dir / "elsewhere")
    assert "Not available: " in invoke_and_read(run_dir)


def invoke_and_read(*arguments: object) -> str:
    return Path(invoke(*arguments).stdout.rstrip("\n")).read_text(encoding="utf-8")


def test_report_of_several_runs_is_written_to_working_directory(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(run_dir, tmp_path / "other")
    result = invoke(run_dir, other, "--no-neighbors", "--title", "A & B")
    assert result.stdout == "report.html\n"
    page = Path("report.html").read_text(encoding="utf-8")
    assert "<h1>A &amp; B</h1>" in page
    assert "<img" not in page
    assert not (run_dir / "report.html").exists()


def test_missing_images_are_reported_in_place_of_neighbors(run_dir: Path, tmp_path: Path, trained: Path) -> None:
    (trained / "images").rename(trained / "moved")
    try:
        page = invoke_and_read(run_dir, "--out", tmp_path / "page.html")
    finally:
        (trained / "moved").rename(trained / "images")
    assert "Not available: " in page
    assert f"{trained / 'images'}" in page
    assert "<img" not in page
    assert 'data-name="loss"' in page


def test_report_does_not_disturb_run_without_checkpoint(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epo')
    assert "1 unreadable line of tiny was skipped." in invoke_and_read(run_dir)
    with lock_run(run_dir, resume=True):
        pass


def test_path_that_is_invalid_utf8_is_printed_unchanged(run_dir: Path, tmp_path: Path) -> None:
    run = run_dir.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    result = invoke(run, "--no-neighbors")
    assert result.stdout_bytes == os.fsencode(run / "report.html") + b"\n"


def test_user_errors_exit_2_without_traceback(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "notes.html").write_text("<h1>mine</h1>")
    for arguments, words in (
        ((run_dir / "nowhere",), "no such run directory"),
        ((run_dir, "--out", run_dir / "notes.html"), "exists and is not a report"),
        ((run_dir, "--out", run_dir / "notes.html" / "page.html"), "choose another"),
        ((), "Missing argument"),
    ):
        monkeypatch.setattr(sys, "argv", ["msf-faiss", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            entry.main()
        out, err = capfd.readouterr()
        assert (ended.value.code, out) == (2, "")
        assert words in err
        assert "Traceback" not in err
    assert (run_dir / "notes.html").read_text() == "<h1>mine</h1>"


def test_report_shows_last_metrics(run_dir: Path) -> None:
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    page = invoke_and_read(run_dir, "--no-neighbors")
    assert f"to {last['loss']:.4g} at step 2" in page
    assert "step 2 of 2" in page.lower()
