"""Execute the steps of the Dockerfile in clean root file systems, without a Docker engine, and test the result.

    make docker-replay                       as root, with debootstrap (Linux); takes 9 GB

A minimal Debian from debootstrap with Python in /usr/local replaces the base image. Every process has its own mount and
process namespaces, as in a container, and sees nothing of this machine but the network and the paths of `--bind`. The
tests of the image: a demo run as its user, health check, stop signal, resume, evaluations, another user, TensorBoard.

Not covered: layers, networks, GPUs, and how an engine treats labels and volumes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

DOCKERFILE = Path(__file__).with_name("Dockerfile")
CONTEXT = DOCKERFILE.parents[1]
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
PACKAGES = "ca-certificates,python3,python3-venv"  # Debian packages
TRAINING = ["pretrain", "demo"]  # with a worker process, which needs /dev/shm
for setting in (
    *("data.images=512", "data.test_images=64", "data.workers=1", "model.backbone.width=4"),
    *("train.epochs=150", "train.log_every=1", "train.threads=1"),
):
    TRAINING += ["--set", setting]


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, its continued lines joined."""

    name: str  # RUN, COPY, ...; upper case
    flags: dict[str, list[str]]  # --mount=... as {"mount": ["..."]}
    text: str  # the rest, before variables are expanded

    @property
    def words(self) -> list[str]:
        """The arguments, from the JSON form or the shell form."""
        return list(json.loads(self.text)) if self.text.startswith("[") else shlex.split(self.text)


@dataclass(slots=True)
class Stage:
    """A stage of the build and the state that its instructions set."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    arguments: dict[str, str] = field(default_factory=dict)  # ARG
    variables: dict[str, str] = field(default_factory=lambda: dict(ENVIRONMENT))  # ENV
    directory: str = "/"
    user: str = "0:0"

    def last(self, name: str) -> Instruction:
        """The last instruction of this name, which is the one in force."""
        return [instruction for instruction in self.instructions if instruction.name == name][-1]


def parse(text: str) -> list[Instruction]:
    r"""Return the instructions of a Dockerfile. Supports no here-documents and no escape character but `\`."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found = []
    for line in re.sub(r"\\\n\s*", "", lines).splitlines():
        name, _, rest = line.strip().partition(" ")
        flags: dict[str, list[str]] = {}
        while match := re.match(r"\s*--([a-z-]+)=(\S+)\s+", rest):
            flags.setdefault(match[1], []).append(match[2])
            rest = rest[match.end() :]
        if name:
            found.append(Instruction(name.upper(), flags, rest.strip()))
    return found


def stages(text: str) -> list[Stage]:
    """Return the stages of a Dockerfile; the last is the image. A stage without a name is called by its number."""
    found: list[Stage] = []
    for instruction in parse(text):
        if instruction.name == "FROM":
            words = instruction.words
            found.append(Stage(words[2] if len(words) == 3 else str(len(found))))
        elif found:  # an ARG before the first FROM selects the base image, which is replaced here
            found[-1].instructions.append(instruction)
    return found


def expand_variables(text: str, variables: Mapping[str, str]) -> str:
    """`text` with $NAME and ${NAME} expanded; an unknown variable becomes empty."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], ""), text)


class Builder:
    """Builds each stage in a root of its own under `work`, from a base that later replays reuse."""

    def __init__(self, work: Path, *, mirror: str | None, binds: list[str], pip_conf: Path | None) -> None:
        self._work, self._binds, self._pip_conf = work.resolve(), binds, pip_conf
        self._base = self._work / "base"
        if not self._base.is_dir():
            begun = self._work / "base.begun"
            shutil.rmtree(begun, ignore_errors=True)
            bootstrap = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(begun)]
            subprocess.run([*bootstrap, *([mirror] if mirror else [])], check=True)
            with self._inside(begun, ["python3", "-m", "venv", "/usr/local"], ENVIRONMENT) as process:
                assert process.wait() == 0, "the base has no Python"
            begun.rename(self._base)

    def build(self, stage: Stage, arguments: Mapping[str, str]) -> None:
        """Execute the instructions of a stage."""
        root = self._root(stage)
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "--archive", str(self._base), str(root)], check=True)
        for instruction in stage.instructions:
            say(f"[{stage.name}] {instruction.name} {instruction.text}")
            self._execute(stage, root, instruction, arguments)

    def _execute(self, stage: Stage, root: Path, instruction: Instruction, arguments: Mapping[str, str]) -> None:
        known = stage.arguments | stage.variables
        match instruction.name:
            case "ARG":
                name, _, value = instruction.words[0].partition("=")
                stage.arguments[name] = arguments.get(name, value)
            case "ENV":
                words = shlex.split(expand_variables(instruction.text, known))
                stage.variables |= dict(word.split("=", 1) for word in words)
            case "WORKDIR":
                stage.directory = instruction.text
                (root / stage.directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "USER":
                stage.user = instruction.text
            case "COPY":
                self._copy(root / stage.directory.lstrip("/"), instruction)
            case "RUN":
                mounts = [self._mount(text) for text in instruction.flags.get("mount", [])]
                command = ["/bin/sh", "-c", instruction.text]
                with self._inside(root, command, known, directory=stage.directory, binds=mounts) as process:
                    if process.wait():
                        sys.exit(f"RUN {instruction.text}: exit code {process.returncode}")
            case "LABEL" | "VOLUME" | "STOPSIGNAL" | "HEALTHCHECK" | "ENTRYPOINT" | "CMD":
                pass  # an engine or `Trial` uses these
            case name:
                sys.exit(f"{name}: the replay does not support this instruction")

    def start(
        self, stage: Stage, command: list[str], *, user: str | None = None
    ) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        """Start a command in the finished image with its variables, user and working directory."""
        root, place = self._root(stage), stage.directory
        return self._inside(
            root, command, stage.variables, directory=place, user=user or stage.user, output=subprocess.PIPE
        )

    def _root(self, stage: Stage) -> Path:
        return self._work / stage.name

    def _copy(self, directory: Path, instruction: Instruction) -> None:
        *sources, target = instruction.words
        for source in sources:
            path = CONTEXT / source
            if path.is_dir():
                unwanted = shutil.ignore_patterns("__pycache__", "*.py[cod]")
                shutil.copytree(path, directory / target, dirs_exist_ok=True, ignore=unwanted)
            else:
                shutil.copy(path, directory / target)

    def _mount(self, text: str) -> str:
        """Return the mount of a `RUN --mount` as FROM:TO, or "" for a secret that was not passed."""
        options = dict(option.split("=", 1) for option in text.split(","))
        if options["type"] == "secret":
            return f"{self._pip_conf}:{options['target']}" if self._pip_conf else ""
        return f"{self._work / options['from']}{options['source']}:{options['target']}"

    @contextlib.contextmanager
    def _inside(
        self,
        root: Path,
        command: list[str],
        variables: Mapping[str, str],
        *,
        directory: str = "/",
        user: str = "0:0",
        binds: list[str] | None = None,
        output: int | None = None,
    ) -> Iterator[subprocess.Popen[str]]:
        """Run `command` as process 1 of a container on `root`; process and mounts end with the context."""
        script = ["mount --make-rprivate /", "mkdir -p dev/shm", "mount -t tmpfs -o mode=1777,size=64m shm dev/shm"]
        script.append("mount -t proc proc proc")
        devices = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
        for pair in [*devices, "/etc/hosts", "/etc/resolv.conf", *self._binds, *filter(None, binds or [])]:
            source, _, target = pair.partition(":")
            place = shlex.quote((target or source).lstrip("/"))
            make = "mkdir -p" if Path(source).is_dir() else f'mkdir -p "$(dirname {place})"; touch'
            script += [f"{make} {place}", f"mount --bind {shlex.quote(source)} {place}"]
        inner = ["chroot", f"--userspec={user}", ".", "env", "--ignore-environment", f"--chdir={directory}"]
        script.append(
            "exec " + shlex.join([*inner, *(f"{name}={value}" for name, value in variables.items()), *command])
        )
        container = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", "\n".join(script)]
        process = subprocess.Popen(container, cwd=root, stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            yield process
        finally:
            process.kill()  # kills process 1 too
            process.wait()


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, flush=True)


class Trial:
    """Tests the finished image and exits at the first failure."""

    def __init__(self, builder: Builder, image: Stage) -> None:
        self._builder, self._image = builder, image
        self._entry = image.last("ENTRYPOINT").words

    def all(self) -> None:
        """Run all tests that need no engine."""
        self._expect(0, [*self._entry, *self._image.last("CMD").words], contains="pretrain")
        self._expect(0, ["sh", "-c", "! command -v cc gcc g++ make cmake git"])
        self._expect(0, ["sh", "-c", 'test "$(id -u)" != 0 && ! touch /usr/local/bin/x 2>/dev/null'])
        self._expect(0, [*self._entry, "doctor"])
        self._expect(0, self._health())
        training = [*self._entry, *TRAINING, "--out", "/runs/trial"]
        with self._builder.start(self._image, training) as process:
            self._read_until(process, "step 20")
            self._expect(0, self._health("/runs/trial"))
            os.kill(pid_of_process_1(process.pid), getattr(signal, self._image.last("STOPSIGNAL").text))
            output, _ = process.communicate(timeout=60)
            self._check(process.returncode == 75, f"SIGTERM while it trains: exit code {process.returncode}", output)
        self._expect(1, self._health("/runs/trial"), contains="interrupted")
        self._expect(0, training, contains="resumed")
        self._expect(0, self._health("/runs/trial"), contains="finished")
        for command in ("eval-knn /runs/trial", "inspect-neighbors /runs/trial", "results /runs/trial"):
            self._expect(0, [*self._entry, *command.split()])
        self._expect(0, ["sh", "-c", 'test -z "$(find /runs/trial -not -user 1000)"'])
        other = [*self._entry, *TRAINING, "--set", "train.max_steps=4", "--out", "/runs/other"]
        self._expect(0, other, user="54321:0")
        self._tensorboard()

    def _health(self, run: str = "") -> list[str]:
        """Return the health check command for `run`."""
        command = self._image.last("HEALTHCHECK").text.partition("CMD ")[2]
        return ["env", f"MSF_FAISS_RUN={run}", *json.loads(command)]

    def _expect(self, code: int, command: list[str], *, contains: str = "", user: str | None = None) -> None:
        with self._builder.start(self._image, command, user=user) as process:
            output, _ = process.communicate(timeout=300)
        named = shlex.join(command) + (f" as {user}" if user else "")
        self._check(
            process.returncode == code and contains in output, f"exit code {process.returncode}: {named}", output
        )

    def _check(self, ok: bool, what: str, output: str) -> None:
        say(f"{'ok  ' if ok else 'FAIL'} {what}")
        if not ok:
            sys.exit(output)

    def _read_until(self, process: subprocess.Popen[str], text: str) -> None:
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            output.append(line)
            if text in line:
                return
        self._check(False, f"the run ended before it printed {text!r}", "".join(output))

    def _tensorboard(self) -> None:
        with self._builder.start(self._image, ["tensorboard", "--logdir", "/runs", "--port", "16006"]) as process:
            for _ in range(120):
                with contextlib.suppress(OSError), urllib.request.urlopen("http://localhost:16006") as page:
                    self._check(page.status == 200, "tensorboard responds", "")
                    return
                time.sleep(0.5)
            process.kill()
            self._check(False, "tensorboard does not respond", process.communicate()[0])


def pid_of_process_1(pid: int) -> int:
    """Return the pid, on this machine, of process 1 of the container that process `pid` started."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def main() -> None:
    """Build every stage, then test the image."""
    parser = argparse.ArgumentParser(
        description="Execute the Dockerfile in clean root file systems, without an engine."
    )
    parser.add_argument("work", type=Path, help="folder for the root file systems; an existing base is reused")
    parser.add_argument("--mirror", metavar="URL", help="Debian mirror for debootstrap")
    parser.add_argument(
        "--bind", action="append", default=[], metavar="FROM[:TO]", help="mount this path inside; repeatable"
    )
    parser.add_argument("--pip-conf", type=Path, help="pip configuration, passed to the build as secret `pip`")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    if os.geteuid():
        sys.exit("needs root, for mount and chroot")
    arguments.work.mkdir(parents=True, exist_ok=True)
    pip_conf = arguments.pip_conf.resolve() if arguments.pip_conf else None
    builder = Builder(arguments.work, mirror=arguments.mirror, binds=arguments.bind, pip_conf=pip_conf)
    for stage in (found := stages(DOCKERFILE.read_text(encoding="utf-8"))):
        builder.build(stage, dict(pair.split("=", 1) for pair in arguments.build_arg))
    Trial(builder, found[-1]).all()


if __name__ == "__main__":
    main()
