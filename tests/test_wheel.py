"""The wheel, built from the source distribution and installed where no checkout is visible."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from msf_faiss_cli.main import _COMMANDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
GENERATED = {"build", "data", "dist", "runs", "site"}  # folders of a checkout that are not in git
IGNORED = shutil.ignore_patterns("__pycache__", "*.py[cod]", ".env")


class Built(NamedTuple):
    source: Path  # the copy of the tree that they were built from
    sdist: Path
    wheel: Path


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Source distribution and wheel of a copy of the tree, built offline. Files of an earlier build are not copied,
    because setuptools would trust its list of files."""
    work = tmp_path_factory.mktemp("built")
    source = work / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        hidden = path.name.startswith(".") and path.name != ".ci"
        if path.is_symlink() or hidden or path.name in GENERATED or path.suffix == ".egg-info":
            continue
        if path.is_dir():
            shutil.copytree(path, source / path.name, ignore=IGNORED)
        else:
            shutil.copy(path, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = work.glob("*.tar.gz"), work.glob("*.whl")
    return Built(source, sdist, wheel)


def test_wheel_contains_exactly_the_packages(built: Built) -> None:
    """Every module, template, style sheet, script and config: none is missing from package-data."""
    in_tree = {f"{package}/{name}" for package, folder in PACKAGES.items() for name in files(built.source / folder)}
    with zipfile.ZipFile(built.wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert in_wheel == in_tree
    assert "msf_faiss/py.typed" in in_wheel


def test_wheel_metadata(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_string(archive.read(f"{info}/METADATA").decode())
        licence = archive.read(f"{info}/licenses/LICENSE")
    project = PROJECT["project"]
    assert (metadata["Name"], metadata["Version"], metadata["Summary"]) == (
        project["name"],
        project["version"],
        project["description"],
    )
    assert metadata["License-Expression"] == project["license"]
    assert metadata["License-File"] == "LICENSE"
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert metadata["Requires-Python"] == project["requires-python"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_source_distribution_contains_the_whole_tree(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    added = {"PKG-INFO", "setup.cfg", *(name for name in names if ".egg-info/" in name)}
    assert names - added == files(built.source) - {name for name in added if ".egg-info/" in name}


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and, through a .pth file, this environment's other packages; not its editable
    msf-faiss, which an import hook provides that only this environment loads."""
    environment = tmp_path_factory.mktemp("installed") / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, str(built.wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (packages,) = environment.glob("lib/python*/site-packages")
    seen = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in sorted(seen)), encoding="utf-8")
    return environment


def run(environment: Path, *command: str | Path, cwd: Path) -> str:
    """The stdout of a program of the environment, which no PYTHON variable leads to a checkout."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {
        "COLUMNS": "100"
    }
    words = [environment / "bin" / command[0], *command[1:]]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, env=variables)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_installed_wheel_has_every_command_and_config(installed: Path, tmp_path: Path) -> None:
    script = """
import contextlib, io, sys
import msf_faiss, msf_faiss_cli, msf_faiss_configs
from msf_faiss.config.load import load_config
from msf_faiss_cli.main import cli
for package in (msf_faiss, msf_faiss_cli, msf_faiss_configs):
    print("from", package.__file__)
commands, configs = (words.split(",") for words in sys.argv[1:])
for name in commands:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert cli.main([name, "--help"], prog_name="msf-faiss", standalone_mode=False) == 0
    assert f"Usage: msf-faiss {name}" in output.getvalue(), name
for name in configs:
    load_config(name)
"""
    names = ",".join(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    output = run(installed, "python", "-c", script, ",".join(_COMMANDS), names, cwd=tmp_path)
    places = [line.removeprefix("from ") for line in output.splitlines() if line.startswith("from ")]
    assert len(places) == 3
    assert all(Path(place).is_relative_to(installed) for place in places), places


def test_msf_faiss_command_is_installed(installed: Path, tmp_path: Path) -> None:
    output = run(installed, "msf-faiss", "--help", cwd=tmp_path)
    for name, summary in _COMMANDS.items():
        assert f"  {name} " in output
        assert summary.split()[0] in output
    assert (
        run(installed, "msf-faiss", "--version", cwd=tmp_path).strip() == f"msf-faiss {PROJECT['project']['version']}"
    )


@pytest.mark.slow
def test_installed_wheel_trains_evaluates_and_inspects(installed: Path, tmp_path: Path) -> None:
    small = "data.images=64 data.test_images=32 train.batch_size=16 train.max_steps=4 optimizer.warmup_epochs=0"
    settings = [part for setting in small.split() for part in ("--set", setting)]
    run(installed, "msf-faiss", "pretrain", "demo", *settings, "--out", "run", cwd=tmp_path)
    run(installed, "msf-faiss", "eval-knn", "run", "--encoder", "online", "--encoder", "untrained", cwd=tmp_path)
    run(installed, "msf-faiss", "eval-linear", "run", "--fast", cwd=tmp_path)
    run(installed, "msf-faiss", "inspect-neighbors", "run", "--out", "page.html", cwd=tmp_path)
    assert "untrained" in run(installed, "msf-faiss", "results", "run", cwd=tmp_path)
    assert "<html" in (tmp_path / "page.html").read_text(encoding="utf-8")
