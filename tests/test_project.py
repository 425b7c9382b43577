"""The fences and the packaging that the design asks for."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "msf_faiss").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names of what a file imports; a relative import begins with a dot."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def those_that_import(package: str) -> set[str]:
    return {
        named(path)
        for path in SOURCES
        if any(name == package or name.startswith(f"{package}.") for name in imports(path))
    }


def test_every_package_is_in_the_wheel() -> None:
    """An unlisted subpackage vanishes from the wheel without a word."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    in_tree = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES if path.name == "__init__.py"} | {
        "configs"
    }
    installed_as = {"cli": "msf_faiss_cli", "configs": "msf_faiss_configs"}
    assert sorted(listed) == sorted(installed_as.get(name, name) for name in in_tree)
    for path in SOURCES:
        assert (path.parent / "__init__.py").exists(), path


def test_faiss_is_imported_in_one_place() -> None:
    assert those_that_import("faiss") == {"msf_faiss/search/faiss_setup.py"}


def test_terminals_are_the_command_lines_business() -> None:
    for package in ("click", "rich"):
        assert all(name.startswith("cli/") for name in those_that_import(package))


def test_only_one_module_may_talk_to_other_ranks() -> None:
    assert those_that_import("torch.distributed") <= {"msf_faiss/distributed/ranks.py"}


def test_the_library_does_not_know_the_command_line() -> None:
    assert those_that_import("msf_faiss_cli") | those_that_import("cli") == set()


def test_the_bank_knows_no_models_and_no_data() -> None:
    allowed = ("msf_faiss.bank", "msf_faiss.config.", "msf_faiss.distributed.ranks", "msf_faiss.errors")
    for path in (ROOT / "msf_faiss" / "bank").glob("*.py"):
        for name in imports(path):
            assert not name.startswith("msf_faiss") or name.startswith(allowed), (named(path), name)


def test_inside_the_command_line_imports_are_relative() -> None:
    for path in (ROOT / "cli").glob("*.py"):
        assert not any(name.startswith("msf_faiss_cli") for name in imports(path))


def test_a_commands_file_begins_with_click_alone() -> None:
    """So that `--help` need not wait for anything else."""
    allowed = {"click", *sys.stdlib_module_names}
    for path in (ROOT / "cli").glob("*.py"):
        if "command" in {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}:
            heavy = {name for name in imports(path, top_level=True) if name.split(".")[0] not in allowed}
            assert not {name for name in heavy if not name.startswith(".")}, (named(path), heavy)


def test_there_is_no_drawer_for_everything() -> None:
    assert not [named(path) for path in SOURCES if path.stem in {"utils", "util", "helpers", "common", "misc"}]


@pytest.mark.parametrize("module", ["config", "config_file", "reports", "schedule", "errors"])
def test_what_needs_no_torch_does_not_import_it(module: str) -> None:
    code = f"import sys, msf_faiss.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_path_of_this_machine_is_pinned() -> None:
    files = [*SOURCES, *(ROOT / "configs").iterdir(), ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "README.md"]
    for path in files:
        if path.is_file():
            assert str(ROOT) not in path.read_text(encoding="utf-8"), path
