import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from invoking import Cli, Invoke
from msf_faiss_cli.main import _COMMANDS, cli

ROOT = Path(__file__).parents[2]


def test_help_lists_commands_and_imports_nothing_heavy() -> None:
    code = """
import sys
from msf_faiss_cli.main import cli
try:
    cli.main(["--help"], prog_name="msf-faiss")
except SystemExit:
    heavy = {"torch", "torchvision", "faiss", "numpy", "pydantic", "rich"} & set(sys.modules)
    print("heavy:", sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: []\n")
    for command in _COMMANDS:
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize("name", _COMMANDS)
def test_help_of_a_command_starts_with_its_summary(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help is not None
    assert " ".join(command.help.split("\n\n")[0].split()) == _COMMANDS[name]


def test_unknown_commands_and_options_are_usage_errors(msf_faiss: Cli) -> None:
    for arguments in (["pretrian"], ["pretrain", "--outt", "x"], ["pretrain", "--resume", "maybe"]):
        done = msf_faiss(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_bug_prints_its_traceback() -> None:
    code = """
import sys
from msf_faiss_cli import config_schema, main
sys.argv = ["msf-faiss", "config-schema"]
config_schema.command.callback = lambda **options: 1 / 0
main.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" in done.stderr


def test_closed_pipe_is_not_an_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m msf_faiss_cli config-schema | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_version(msf_faiss: Cli) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert msf_faiss("--version").stdout == f"msf-faiss {version}\n"


@pytest.mark.parametrize("problem", ["link to itself", "long name"])
@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "demo", "--out", "BAD"],
        ["pretrain", "demo", "--out", "BAD/run"],
        ["pretrain", "--out", "BAD"],
        ["pretrain", "demo", "--out", "new", "--resume", "BAD"],
        ["pretrain", "BAD"],
        ["status", "BAD"],
        ["results", "BAD"],
        ["report", "BAD"],
        ["report", "RUN", "--out", "BAD"],
        ["export", "BAD", "--format", "safetensors"],
        ["export", "RUN", "--format", "safetensors", "--out", "BAD"],
        ["embed", "BAD", "--out", "x.npy"],
        ["embed", "RUN", "--out", "BAD.npy"],
        ["embed", "RUN", "--out", "x.npy", "--data", "BAD"],
        ["index", "RUN", "--out", "BAD"],
        ["index", "RUN", "--out", "x.faiss", "--data", "BAD"],
        ["eval-knn", "BAD"],
        ["eval-knn", "RUN", "--out", "BAD"],
        ["inspect-neighbors", "BAD"],
        ["inspect-neighbors", "RUN", "--out", "BAD/x.html"],
        ["inspect-neighbors", "RUN", "--query", "BAD", "--out", "x.html"],
    ],
    ids=" ".join,
)
def test_paths_that_cannot_be_looked_at_are_named(
    command: list[str], problem: str, invoke: Invoke, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad, reason = ("loop", "Too many levels of symbolic links")
    if problem == "long name":
        bad, reason = "n" * 300, "File name too long"
    else:
        for name in (bad, f"{bad}.npy"):
            Path(name).symlink_to(name)
    done = invoke(*(word.replace("BAD", bad).replace("RUN", str(tiny_run)) for word in command))
    assert done.code == 2, done.stderr
    assert bad in done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
