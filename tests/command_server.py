"""`msf-faiss` in processes that start at once, forked from one that has loaded the libraries: a new one takes seconds.

Such a process differs from a new one in three ways: the libraries have seen the server's environment, not its own; BLAS
has one thread; and its parent is the server.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import selectors
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LOADED = ("msf_faiss_cli.main", "msf_faiss.train.trainer", "torch._dynamo", "torch.utils.tensorboard", "cv2")
_STREAMS = 3
_MAX_REQUEST = 1 << 20  # bytes


class Command(subprocess.Popen[str]):
    """`msf-faiss ARGUMENTS`; options as Popen's `stdout`, `stderr`, `cwd`, `env` and `start_new_session`."""

    def __init__(self, *arguments: object, **options: Any) -> None:
        super().__init__([str(argument) for argument in arguments], text=True, **options)

    def _execute_child(self, args: Sequence[str], *others: Any) -> None:  # where Popen forks
        _, _, _, _, cwd, env, _, _, _, *pipes, _, _, _, _, _, new_session, _ = others
        read_in, _, _, write_out, _, write_error = pipes
        streams = [stream if pipe == -1 else pipe for stream, pipe in enumerate((read_in, write_out, write_error))]
        environment = dict(os.environ if env is None else env)
        request = {"arguments": args, "cwd": str(cwd or Path.cwd()), "env": environment, "new_session": new_session}
        self._channel, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(_server(), [json.dumps(request).encode()], [theirs.fileno(), *streams])
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        self._child_created = True
        self.pid = int(self._channel.recv(32))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._channel.settimeout(None if timeout is None else max(0, timeout))
            try:
                self.returncode = int(self._channel.recv(32))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._channel.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `msf-faiss ARGUMENTS` to its end, and return exit code, stdout and stderr."""
    with Command(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as command:
        stdout, stderr = command.communicate()
    return subprocess.CompletedProcess(command.args, command.returncode, stdout, stderr)


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # a BLAS with threads may hang after a fork
    with theirs:
        server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment
        )
    atexit.register(server.wait)
    atexit.register(ours.close)  # which ends the server
    return ours


def _serve(requests: socket.socket) -> list[str] | None:
    """Fork for each request. Returns the arguments of a command in its process, and None in the server at its end."""
    for name in _LOADED:
        importlib.import_module(name)
    gc.freeze()  # or a collection in a child copies all pages
    running: dict[int, tuple[int, socket.socket]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd in running:
                    pid, channel = running.pop(key.fd)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with channel, contextlib.suppress(BrokenPipeError):
                        channel.send(str(code).encode())
                    continue
                message, descriptors, _, _ = socket.recv_fds(requests, _MAX_REQUEST, 1 + _STREAMS)
                if not message:
                    return None
                pid = os.fork()
                if pid == 0:
                    for _process, channel in running.values():
                        channel.close()
                    requests.close()
                    return _become(json.loads(message), descriptors)
                channel = socket.socket(fileno=descriptors[0])
                for descriptor in descriptors[1:]:
                    os.close(descriptor)
                channel.send(str(pid).encode())
                ended = os.pidfd_open(pid)
                running[ended] = pid, channel
                selector.register(ended, selectors.EVENT_READ)


def _become(request: dict[str, Any], descriptors: list[int]) -> list[str]:
    """Make this process the command of a request: its streams, folder, environment and session."""
    os.close(descriptors[0])
    for stream, descriptor in enumerate(descriptors[1:]):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    # Buffered as in a new process.
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    if request["new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    arguments: list[str] = request["arguments"]
    return arguments


def _main(arguments: list[str]) -> int:
    from msf_faiss_cli.main import main

    sys.argv = ["msf-faiss", *arguments]
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    os.setsid()  # Ctrl-C is for the tests
    given = _serve(socket.socket(fileno=int(sys.argv[1])))
    if given is not None:
        code = _main(given)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)  # freeing the libraries' objects would copy their pages
