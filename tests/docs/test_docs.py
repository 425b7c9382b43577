"""Run every code block of docs/, page by page, in this process; a comment before a block gives the reason not to.

Shell blocks have one command per line, and `small_commands` makes each small. The Python blocks of a page share their
names. YAML blocks are configs; a title is the name of a file that later blocks use. Text blocks are output.
"""

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import small_commands
import yaml
from documents import DOCS, Block, blocks, blocks_of, commands, draw_photos
from msf_faiss_cli.main import cli
from small_commands import made_small

from msf_faiss.config.load import load_config

BLOCKS = blocks()
PAGES = sorted({block.page for block in BLOCKS})
NOT_RUN = [block for block in BLOCKS if block.not_run]
FRESH = {"quick-start.md"}  # pages that train runs/first themselves; the others get it
MAX_WIDTH = 88  # see docs/assets/docs.css
PHOTOS = {"exporting.md"}  # pages that get a run on photos, with a ResNet

Run = Callable[[str], None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run msf-faiss in this process, and other commands in a new one."""
    return lambda command: small_commands.run(command, monkeypatch, capfd)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that the pages use: photos and a run of the demo."""
    folder = tmp_path_factory.mktemp("docs")
    draw_photos(folder / "photos", 8, seed=0)
    draw_photos(folder / "photos-held-out", 4, seed=1)
    words = made_small(f"msf-faiss pretrain demo --out {folder / 'runs' / 'first'}")
    assert cli.main(words[1:], prog_name=words[0], standalone_mode=False) == 0
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page: str, prepared: Path, run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if page in FRESH:
        shutil.rmtree(tmp_path / "runs")
    if page in PHOTOS:
        run("msf-faiss pretrain folder --set data.path=photos --set model.backbone.kind=torchvision --out runs/photos")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: dict[str, Any] = {}
    for block in blocks_of(DOCS / page):
        match block.language:
            case _ if block.not_run:
                pass
            case "sh":
                for command in commands(block):
                    run(command)
            case "python":
                exec(compile("\n" * block.line + block.text, DOCS / page, "exec"), names)
            case "yaml":
                file = tmp_path / (block.title or "config.yaml")
                file.write_text(block.text, encoding="utf-8")
                load_config(file)
            case "json":
                json.loads(block.text)


def test_every_block_has_a_known_language() -> None:
    unknown = [str(block) for block in BLOCKS if block.language not in {"sh", "python", "yaml", "json", "text"}]
    assert not unknown


def test_code_fits_the_page() -> None:
    code = [(block, line) for block in BLOCKS if block.language != "text" for line in block.text.splitlines()]
    assert not [f"{block}: {line}" for block, line in code if len(line) > MAX_WIDTH]


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: f"{block}: {block.not_run}")
def test_blocks_not_run_are_valid(block: Block) -> None:
    """Their syntax is valid, and their msf-faiss commands and options exist."""
    match block.language:
        case "sh":
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            for command in commands(block):
                for arguments in msf_faiss_arguments(command):
                    parse(arguments)
        case "python":
            compile(block.text, str(block), "exec")
        case "yaml":
            assert isinstance(yaml.safe_load(block.text), dict)
        case other:
            pytest.fail(f"{other} blocks are never run")


def msf_faiss_arguments(command: str) -> list[list[str]]:
    """Return the arguments of each msf-faiss command in a line of shell."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = [*lexer, ";"]
    named = [i for i, word in enumerate(words) if word in ("msf-faiss", "msf_faiss_cli")]
    starts = [i for i in named if words[i - 1] != "--tag"]  # the Docker image has the same name
    ends = [next(j for j in range(i, len(words)) if set(words[j]) <= set("();<>|&")) for i in starts]
    return [words[start + 1 : end] for start, end in zip(starts, ends, strict=True)]


def parse(arguments: list[str]) -> None:
    """Let click parse the arguments, without running the command."""
    context = click.Context(cli, info_name="msf-faiss")
    command = cli.get_command(context, arguments[0])
    assert command is not None, f"no command {arguments[0]}"
    command.make_context(arguments[0], arguments[1:], parent=context)


def test_commands_are_extracted_and_parsed() -> None:
    assert msf_faiss_arguments("torchrun --nproc-per-node=2 -m msf_faiss_cli status 'a b' && x; msf-faiss doctor") == [
        ["status", "a b"],
        ["doctor"],
    ]
    for wrong in (["status", "--no-such"], ["no-such"]):
        with pytest.raises((click.UsageError, AssertionError)):
            parse(wrong)
