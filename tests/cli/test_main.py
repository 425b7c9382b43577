import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from invoking import Cli

ROOT = Path(__file__).parents[2]
COMMANDS = [
    *("pretrain", "eval-knn", "eval-linear", "inspect-neighbors", "results", "export", "embed", "index"),
    *("doctor", "config-schema"),
]


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
    for command in COMMANDS:
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(msf_faiss: Cli, command: str) -> None:
    done = msf_faiss(command, "--help")
    assert done.returncode == 0
    assert f"Usage: msf-faiss {command}" in done.stdout


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
