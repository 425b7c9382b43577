"""Licence, changelog, citation and the contributors' page agree with the project, and with one another."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from msf_faiss_cli.main import _COMMANDS

import msf_faiss

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_licence_is_apaches() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert [line.strip() for line in text.strip().splitlines()[:2]] == ["Apache License", "Version 2.0, January 2004"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert not [name for name in PROJECT["classifiers"] if name.startswith("License ::")], "the expression says it"


def test_one_version_everywhere() -> None:
    assert PROJECT["version"] == msf_faiss.__version__
    newest = re.search(r"^## \[(.+)\] - (Unreleased|\d{4}-\d\d-\d\d)$", CHANGELOG, flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"]


def test_the_oldest_python_is_the_one_that_is_classified() -> None:
    versions = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    assert f">={versions[0]}" == PROJECT["requires-python"]
    assert PYPROJECT["tool"]["mypy"]["python_version"] == versions[0]


def test_the_changelog_keeps_its_form_and_names_every_command() -> None:
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", CHANGELOG, flags=re.MULTILINE)) <= kinds
    for command in _COMMANDS:
        assert re.search(rf"`(msf-faiss )?{command}`", CHANGELOG), command


def test_the_citation_is_complete() -> None:
    """What CFF 1.2 requires, of the software and of a reference."""
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
def test_files_that_are_linked_are_there(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_what_contributors_are_told_is_there() -> None:
    folders = ("msf_faiss/", "cli/", "configs/", "tests/", "docker/", "benchmarks/")
    for name in re.findall(r"`([^` ]+)`", CONTRIBUTING):
        if name.startswith(folders) and "NAME" not in name:
            assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make ([a-z-]+)|`make ([a-z-]+)`", CONTRIBUTING, flags=re.MULTILINE):
        assert f"\n{''.join(target)}:" in makefile
    markers = {marker.partition(":")[0] for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert markers <= set(re.findall(r"^\| `(\w+)` \|", CONTRIBUTING, flags=re.MULTILINE))


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "decisions").glob("*.md")), ids=lambda page: page.stem)
def test_a_decision_has_its_number_and_a_status(page: Path) -> None:
    title, _, status, *_ = page.read_text(encoding="utf-8").splitlines()
    assert re.match(rf"# {int(page.name[:4])}\. \S", title)
    assert status.startswith("Status: ")
    assert len(list(page.parent.glob(f"{page.name[:4]}-*"))) == 1
