"""Licence, changelog, citation and contributing guide agree with the project and with each other."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from msf_faiss_cli.main import _COMMANDS
from test_project import LAYERS

import msf_faiss

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert [line.strip() for line in text.strip().splitlines()[:2]] == ["Apache License", "Version 2.0, January 2004"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert not [name for name in PROJECT["classifiers"] if name.startswith("License ::")], "redundant"


def test_package_and_changelog_have_the_project_version() -> None:
    assert PROJECT["version"] == msf_faiss.__version__
    newest = re.search(r"^## \[(.+)\] - (Unreleased|\d{4}-\d\d-\d\d)$", CHANGELOG, flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"]


def test_classifiers_start_with_the_required_python() -> None:
    versions = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    assert f">={versions[0]}" == PROJECT["requires-python"]
    assert PYPROJECT["tool"]["mypy"]["python_version"] == versions[0]


def test_changelog_follows_keep_a_changelog_and_names_every_command() -> None:
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", CHANGELOG, flags=re.MULTILINE)) <= kinds
    for command in _COMMANDS:
        assert re.search(rf"`(msf-faiss )?{command}`", CHANGELOG), command


def test_citation_is_complete() -> None:
    """Fields that CFF 1.2 requires of the software and of a reference."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"] == PROJECT["name"]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    (paper,) = citation["references"]
    assert (paper["type"], paper["title"]) == ("conference-paper", "Mean Shift for Self-Supervised Learning")
    assert [author["family-names"] for author in paper["authors"]] == ["Koohpayegani", "Tejankar", "Pirsiavash"]
    assert paper["conference"]["name"]
    assert paper["url"] in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md", "docker/README.md"])
def test_linked_files_exist(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_contributing_names_files_targets_and_markers_that_exist() -> None:
    folders = ("msf_faiss/", "cli/", "configs/", "tests/", "docker/", "benchmarks/")
    for name in re.findall(r"`([^` ]+)`", CONTRIBUTING):
        if name.startswith(folders) and "NAME" not in name:
            assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make ([a-z-]+)|`make ([a-z-]+)`", CONTRIBUTING, flags=re.MULTILINE):
        assert f"\n{''.join(target)}:" in makefile
    markers = {marker.partition(":")[0] for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert markers <= set(re.findall(r"^\| `(\w+)` \|", CONTRIBUTING, flags=re.MULTILINE))


def test_contributing_shows_the_layers() -> None:
    rows = re.findall(r"^\| \d+ \| (.+?) \|", CONTRIBUTING, flags=re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == list(LAYERS)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "decisions").glob("*.md")), ids=lambda page: page.stem)
def test_decision_has_a_number_and_a_status(page: Path) -> None:
    title, _, status, *_ = page.read_text(encoding="utf-8").splitlines()
    assert re.match(rf"# {int(page.name[:4])}\. \S", title)
    assert status.startswith("Status: ")
    assert len(list(page.parent.glob(f"{page.name[:4]}-*"))) == 1
