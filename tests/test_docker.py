"""Checks of docker/ that need no engine: its files, commands and flags exist, and its rules hold.

`make docker-replay` executes the Dockerfile's steps in a clean root file system; see docs/decisions/0014-docker.md.
"""

import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml
from msf_faiss_cli.main import cli
from msf_faiss_cli.signals import _SIGNALS
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def load_replay() -> ModuleType:
    spec = importlib.util.spec_from_file_location("replay", DOCKER / "replay.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["replay"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


replay = load_replay()
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
METADATA, BUILDER, IMAGE = replay.stages(DOCKERFILE)
README = (DOCKER / "README.md").read_text(encoding="utf-8")


def composed(*files: str, **chosen: str) -> Any:
    """Services of the compose files, merged, with variables replaced by `chosen` values and defaults."""
    services: dict[str, Any] = {}
    for file in files:
        text = (DOCKER / file).read_text(encoding="utf-8")
        text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: chosen.get(match[1], match[2]), text)
        for name, service in yaml.safe_load(text)["services"].items():
            services[name] = {**services.get(name, {}), **service}
    return services


def assert_parses(words: list[str]) -> None:
    """`msf-faiss WORDS` is a command with options that exist; it is not run."""
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None, words
    if "--help" not in words:
        command.make_context(words[0], words[1:])


def test_parse_reads_flags_and_continued_lines() -> None:
    text = (
        "# a comment\nFROM a AS b\nRUN --mount=type=x,y=z --mount=w \\\n  # within\n    one \\\n    && two\n\nCMD ['c']"
    )
    first, second, third = replay.parse(text.replace("'", '"'))
    assert (first.name, first.words) == ("FROM", ["a", "AS", "b"])
    assert (second.text, second.flags) == ("one && two", {"mount": ["type=x,y=z", "w"]})
    assert third.words == ["c"]
    assert replay.expand_variables("$A ${B}c $D", {"A": "1", "B": "2"}) == "1 2c "


def test_replay_supports_every_instruction() -> None:
    """An unknown instruction would end the replay after minutes."""
    known = set(re.findall(r'"([A-Z]+)"', (DOCKER / "replay.py").read_text(encoding="utf-8")))
    assert {instruction.name for instruction in replay.parse(DOCKERFILE)} <= known | {"FROM"}


def test_sources_of_the_wheel_reach_the_builder() -> None:
    copied = {source for one in BUILDER.instructions if one.name == "COPY" for source in one.words[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    project, setuptools = PROJECT["project"], PROJECT["tool"]["setuptools"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"], *setuptools["package-dir"].values()}
    assert copied == needed
    assert [one.words[0] for one in METADATA.instructions if one.name == "COPY"] == ["pyproject.toml"]
    rules = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {rule[1:] for rule in rules if rule.startswith("!")} == needed
    assert "*" in rules


def test_project_metadata_precedes_tool_sections() -> None:
    """The first build stage cuts pyproject.toml off at the first tool section."""
    metadata, tools, _ = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\n[tool.")
    assert tools
    whole = {name: table for name, table in PROJECT.items() if name != "tool"}
    assert tomllib.loads(metadata) == whole


def test_image_has_no_build_tools_and_no_caches() -> None:
    runs = [one.text for one in IMAGE.instructions if one.name == "RUN"]
    assert not [one for one in IMAGE.instructions if one.name in {"COPY", "ADD"}]
    for run in runs:
        assert not re.search(r"\b(apt-get|apt|gcc|g\+\+|cc|make|cmake|git|build-essential|build|wheel)\b(?!s/)", run), (
            run
        )
    for one in (*METADATA.instructions, *BUILDER.instructions, *IMAGE.instructions):
        if one.name == "RUN" and "pip " in one.text:
            assert "--no-cache-dir" in one.text


def test_image_runs_as_a_numeric_non_root_user() -> None:
    names = [one.name for one in IMAGE.instructions]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", IMAGE.last("USER").text)
    assert "RUN" not in names[names.index("USER") :]


def test_image_labels_agree_with_the_project() -> None:
    project = PROJECT["project"]
    label = dict(word.split("=", 1) for word in IMAGE.last("LABEL").words)
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in label.items()}
    assert labels["title"] == project["name"]
    assert labels["version"] == project["version"]
    assert labels["description"] == project["description"]
    assert labels["licenses"] == project["license"]


def test_entrypoint_signal_and_extras_exist() -> None:
    assert IMAGE.last("ENTRYPOINT").words[0] in PROJECT["project"]["scripts"]
    assert IMAGE.last("CMD").words == ["--help"]
    assert IMAGE.last("STOPSIGNAL").text in {number.name for number in _SIGNALS}
    (extras,) = [one.text.partition("=")[2] for one in IMAGE.instructions if one.text.startswith("EXTRAS=")]
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize(
    ("run", "status", "health"), [("", 9, 0), ("/runs/a b", 0, 0), ("/runs/a b", 3, 1), ("/runs/a b", 2, 1)]
)
def test_health_check_follows_the_run(tmp_path: Path, run: str, status: int, health: int) -> None:
    """Docker allows only the codes 0 and 1. Without a run, the container is healthy."""
    stub = tmp_path / "msf-faiss"
    stub.write_text(
        f'#!/bin/sh\ntest "$1" = status && test "$2" = "/runs/a b" && test $# = 2 || exit 7\nexit {status}\n'
    )
    stub.chmod(0o755)
    check = IMAGE.last("HEALTHCHECK").text.partition("CMD ")[2]
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MSF_FAISS_RUN": run}
    assert subprocess.run(yaml.safe_load(check), env=variables, check=False).returncode == health
    assert_parses(["status", "/runs/demo"])


def test_training_service_restarts_with_a_limit_and_resumes() -> None:
    train = composed("compose.yaml")["train"]
    assert re.fullmatch(r"on-failure:\d+", train["restart"])
    assert train["stop_grace_period"] == "10m"
    assert train["init"] is True
    words = shlex.split(train["command"])
    assert_parses(words)
    assert words[words.index("--out") + 1] == train["environment"]["MSF_FAISS_RUN"]
    assert "--resume" not in words, "the default, auto, resumes a run"
    assert (ROOT / train["build"]["dockerfile"]).is_file()
    assert (DOCKER / train["build"]["context"]).resolve() == ROOT


def test_options_reach_the_training() -> None:
    options = "--set data.path=/data/photos --metrics-port 9400"
    words = shlex.split(composed("compose.yaml", CONFIG="folder", OPTIONS=options)["train"]["command"])
    assert words[:2] == ["pretrain", "folder"]
    assert words[-4:] == shlex.split(options)
    assert_parses(words)


def test_gpu_file_adds_torchrun_to_the_same_service() -> None:
    """One process per GPU; otherwise the service is the CPU one."""
    alone, both = composed("compose.yaml"), composed("compose.yaml", "compose.gpu.yaml")
    assert "gpu" not in str(alone)
    assert set(alone) == set(both)
    train = both["train"]
    assert train["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    launcher, *words = shlex.split(train["entrypoint"]) + shlex.split(train["command"])
    assert launcher == "torchrun"
    parsed = get_args_parser().parse_args(words)
    assert parsed.module
    assert parsed.training_script == "msf_faiss_cli"
    assert_parses(parsed.training_script_args)


def test_volumes_are_those_of_the_image() -> None:
    whole = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    services = composed("compose.yaml")
    mounted = dict(volume.split(":")[:2] for volume in services["train"]["volumes"])
    assert set(mounted.values()) == set(IMAGE.last("VOLUME").words)
    assert set(mounted) == set(whole["volumes"])
    assert services["tensorboard"]["volumes"] == ["runs:/runs:ro"]


def test_example_env_lists_every_variable() -> None:
    text = "".join((DOCKER / name).read_text(encoding="utf-8") for name in ("compose.yaml", "compose.gpu.yaml"))
    example = (DOCKER / "example.env").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    shown = dict(re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", example, flags=re.MULTILINE))
    assert set(defaults) - set(shown) == {"IMAGE"}
    assert set(shown) <= set(defaults)
    assert all(shown[name] == defaults[name] for name in set(shown) - {"DATA", "RUNS"})


def test_no_registry_is_named() -> None:
    for path in DOCKER.iterdir():
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        assert {address.split("/")[0].split(":")[0] for address in re.findall(r"https?://([^\s'\")]+)", text)} <= {
            "localhost"
        }, path
    images = [*re.findall(r"^ARG PYTHON_IMAGE=(\S+)", DOCKERFILE, flags=re.MULTILINE), "msf-faiss"]
    assert all("." not in image.partition("/")[0].partition(":")[0] for image in images)


def test_readme_commands_exist() -> None:
    """Files and services of `docker compose`, and the msf-faiss commands of `docker run` and `docker exec`."""
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
        for line in block.replace("\\\n", "").splitlines()
    ]
    assert len(lines) >= 8
    services = composed("compose.yaml", "compose.gpu.yaml")
    for line in lines:
        words = shlex.split(line)
        for flag in ("--file", "--env-file"):
            named = [word for before, word in itertools.pairwise(words) if before == flag]
            assert all((ROOT / name).is_file() or name == "docker/.env" for name in named), line
        if words[:2] == ["docker", "run"]:
            image = len(words) - words[::-1].index("msf-faiss") - 1
            assert_parses(words[image + 1 :])
        elif words[:2] == ["docker", "compose"] and (action := {"run", "exec", "logs"} & set(words)):
            service = next(word for word in words[words.index(action.pop()) + 1 :] if not word.startswith("-"))
            assert service in services, line
            rest = words[words.index(service) + 1 :]
            if rest and rest[0] != "tensorboard":
                assert_parses(rest[1:] if rest[0] == "msf-faiss" else rest)
