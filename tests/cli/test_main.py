import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from invoking import Cli
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
