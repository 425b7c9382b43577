"""Layers, import fences, sizes and packaging."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "msf_faiss").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])


# Rooms from the lowest layer up. A room imports from lower layers only; rooms of one layer do not know each other.
LAYERS = (
    ("errors", "text", "counter_rng", "threads"),
    ("files",),
    ("config", "device"),
    ("distributed", "search", "views"),
    ("bank", "data", "models"),
    ("checkpoint",),
    ("run", "embeddings"),
    ("evaluate", "neighbors"),
    ("train", "export", "report", "doctor"),
)


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names of what a file imports; a relative import begins with a dot."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def relative_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def importers(package: str) -> set[str]:
    return {
        relative_path(path)
        for path in SOURCES
        if any(name == package or name.startswith(f"{package}.") for name in imports(path))
    }


def module_graph() -> dict[str, set[str]]:
    """For each module of the library but its root, the modules that it imports, inside functions too."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCES
        if path.parts[len(ROOT.parts)] == "msf_faiss"
    }
    del modules["msf_faiss"]  # hands on the public names lazily
    return {
        module: {
            target
            for name in imports(path)
            for target in (name, name.rpartition(".")[0])
            if target in modules and not (target != name and name in modules)
        }
        for module, path in modules.items()
    }


def test_no_room_imports_from_its_own_or_a_higher_layer() -> None:
    floor = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    graph = module_graph()
    assert {module.split(".")[1] for module in graph} == set(floor)
    climbs = [
        f"{module} -> {target}"
        for module, targets in graph.items()
        for target in targets
        if (here := module.split(".")[1]) != (there := target.split(".")[1]) and floor[there] >= floor[here]
    ]
    assert climbs == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter(module_graph()).prepare()  # raises CycleError, which names the circle


def test_the_root_of_the_package_fits_on_a_screen() -> None:
    visible = [path for path in (ROOT / "msf_faiss").iterdir() if not path.name.startswith(("__pycache__", "."))]
    assert len([path for path in visible if path.is_file()]) <= 12


def test_classes_and_functions_stay_short() -> None:
    limits = {ast.ClassDef: 250, ast.FunctionDef: 80}
    long = [
        f"{relative_path(path)}: {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if type(node) in limits and node.end_lineno - node.lineno >= limits[type(node)]
    ]
    assert long == []


def test_scripts_of_pages_stay_short() -> None:
    scripts = [*(ROOT / "msf_faiss").rglob("*.js")]
    assert scripts
    assert [relative_path(path) for path in scripts if len(path.read_text(encoding="utf-8").splitlines()) > 500] == []


def test_every_package_is_in_the_wheel() -> None:
    """setuptools silently leaves out a package that is not listed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    in_tree = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES if path.name == "__init__.py"} | {
        "configs"
    }
    installed_as = {"cli": "msf_faiss_cli", "configs": "msf_faiss_configs"}
    assert sorted(listed) == sorted(installed_as.get(name, name) for name in in_tree)
    for path in SOURCES:
        assert (path.parent / "__init__.py").exists(), path


def test_faiss_is_imported_in_one_place() -> None:
    assert importers("faiss") == {"msf_faiss/search/faiss_setup.py"}


def test_only_the_command_line_imports_click_and_rich() -> None:
    for package in ("click", "rich"):
        assert all(name.startswith("cli/") for name in importers(package))


def test_torch_distributed_is_imported_in_one_place() -> None:
    assert importers("torch.distributed") <= {"msf_faiss/distributed/ranks.py"}


def test_the_library_does_not_import_the_command_line() -> None:
    assert importers("msf_faiss_cli") | importers("cli") == set()


def test_the_command_line_imports_itself_relatively() -> None:
    for path in (ROOT / "cli").glob("*.py"):
        assert not any(name.startswith("msf_faiss_cli") for name in imports(path))


def test_commands_import_only_click_at_the_top() -> None:
    """`--help` imports nothing else."""
    allowed = {"click", *sys.stdlib_module_names}
    for path in (ROOT / "cli").glob("*.py"):
        if "command" in {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}:
            heavy = {name for name in imports(path, top_level=True) if name.split(".")[0] not in allowed}
            assert not {name for name in heavy if not name.startswith(".")}, (relative_path(path), heavy)


def test_no_module_is_called_utils() -> None:
    assert not [relative_path(path) for path in SOURCES if path.stem in {"utils", "util", "helpers", "common", "misc"}]


@pytest.mark.parametrize(
    "module", ["msf_faiss", "msf_faiss.config.load", "msf_faiss.run.events", "msf_faiss.run.status"]
)
def test_config_events_and_errors_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_file_names_the_path_of_this_checkout() -> None:
    files = [*SOURCES, *(ROOT / "configs").iterdir(), ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "README.md"]
    for path in files:
        if path.is_file():
            assert str(ROOT) not in path.read_text(encoding="utf-8"), path
