"""Runs every command of the README, with settings appended that make it small."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_commands import DEMO, run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shell_blocks() -> list[str]:
    return [
        line
        for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
        for line in block.splitlines()
        if line and not line.startswith("#")
    ]


def test_indented_commands_are_make_demo_and_make_test() -> None:
    commands = re.findall(r"^(?:    )(\S.*)$", README, flags=re.MULTILINE)
    assert commands == ["make demo", "make test"]


def test_every_shell_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(8):
        folder = tmp_path / "photos" / ("cats", "dogs")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{i}.jpg")
    commands = shell_blocks()
    assert len(commands) >= 8
    for command in commands:
        run(command, monkeypatch, capfd)


def test_table_lists_every_command() -> None:
    from msf_faiss_cli.main import _COMMANDS

    assert re.findall(r"^\| `msf-faiss ([a-z-]+)", README, flags=re.MULTILINE) == list(_COMMANDS)


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in the environment that runs the tests, without installing anything."""
    environment = Path(sys.executable).parents[1]
    stamps = [part for stamp in (".installed", ".installed-dev") for part in ("-o", f"{environment}/{stamp}")]
    return subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory", f"VENV={environment}", *stamps, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}},
    )


def test_make_demo_trains_evaluates_and_writes_pages(tmp_path: Path) -> None:
    """On few images; `make test-slow` runs the whole demo."""
    small = " ".join(f"--set {setting}" for setting in DEMO)
    done = make("demo", f"RUN={tmp_path / 'run'}", f"DEMO={small}")
    assert done.returncode == 0, done.stderr
    last = done.stdout[done.stdout.rindex("accuracy in %") :]
    for word in ("untrained", "20-NN", "linear", str(tmp_path / "run" / "neighbors")):
        assert word in last


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_make_demo_learns(tmp_path: Path, seed: int) -> None:
    """Accuracy is 20 points above the untrained encoder and above raw pixels; purity more than doubles."""
    run_dir = tmp_path / "run"
    done = make("demo", f"RUN={run_dir}", f"DEMO=--set seed={seed}")
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in (run_dir / "results").glob("knn-*.json")]
    accuracy = {
        result["encoder"]: score["accuracy"]
        for result in results
        for score in result["scores"]
        if score["metric"] == "20-NN"
    }
    assert accuracy["online"] > accuracy["untrained"] + 0.2
    assert accuracy["online"] > accuracy["pixels"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    purities = [line["purity"] for line in lines if line.get("purity") is not None]
    assert np.mean(purities[-5:]) > 2 * np.mean(purities[3:8])


@pytest.mark.parametrize("target", ["test", "check", "test-slow", "soak"])
def test_make_targets_of_the_readme_exist(target: str) -> None:
    """Dry runs, because `make test` runs this test; CI runs `make check`."""
    assert f"make {target}" in README
    done = make("-n", target)
    assert done.returncode == 0, done.stderr
    assert "-m pytest" in done.stdout
    assert "make check" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
