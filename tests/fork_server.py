"""Python programs run in processes forked from one that has imported the large libraries already.

Importing transformers and mlx_lm takes two seconds of CPU time, more than most tests ask of a
process that they start. The server is a plain process without threads of its own; none of this
project's packages are loaded there but `backend`, which has to come before mlx. A test whose
subject is a process from its start (signals, imports, each command once) starts a real one.
"""

from __future__ import annotations

import array
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nested_core import backend

LIBRARIES = ("mlx_lm.utils", "mlx_lm.tuner.lora", "pydantic", "rich.table", "yaml", "pandas")
REQUEST_BYTES = 2**20


def python(
    *command: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run `python PROGRAM ARGUMENTS` to its end, as `subprocess.run` would with its output kept.

    Raises subprocess.TimeoutExpired, after killing the process, when it takes longer.
    """
    words = list(map(str, command))
    if sys.platform != "linux":  # where a process that has loaded Metal may not fork
        return subprocess.run(
            [sys.executable, *words],
            cwd=cwd,
            env=env,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        code = start_server().run(
            words, cwd or Path.cwd(), env or os.environ, timeout, (stdout.fileno(), stderr.fileno())
        )
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(words, code, stdout.read(), stderr.read())


class ForkServer:
    """The server's process, seen from the tests; it ends when its socket is closed."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_BYTES)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__)), str(theirs.fileno())],
                cwd=Path(__file__).parents[1],
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def run(
        self,
        command: list[str],
        cwd: Path,
        env: Mapping[str, str],
        timeout: float,
        outputs: tuple[int, int],
    ) -> int:
        """The exit code of a program whose standard output and error go to the files given."""
        request = {"command": command, "cwd": str(cwd), "env": dict(env)}
        ours, theirs = socket.socketpair()
        with ours, theirs:
            rights = array.array("i", [*outputs, theirs.fileno()])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            self._socket.sendmsg([json.dumps(request).encode()], ancillary)
            theirs.close()
            with ours.makefile("r") as answers:
                process = int(answers.readline())
                ours.settimeout(timeout)
                try:
                    return int(answers.readline())
                except TimeoutError as error:
                    os.kill(process, signal.SIGKILL)
                    raise subprocess.TimeoutExpired(command, timeout) from error


_starting = threading.Lock()


@cache
def _start_server() -> ForkServer:
    return ForkServer()


def start_server() -> ForkServer:
    """The one server of this process, started when it is first needed."""
    with _starting:
        return _start_server()


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each request; tell who asked the process id and, later, the exit code.

    Returns None in the server, at its end, and the request in each process that was forked for one.
    """
    waiting: dict[int, socket.socket] = {}
    woken, wake_up = socket.socketpair()
    wake_up.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake_up.fileno())
    with woken, wake_up, selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if woken in ready:
                woken.recv(2**12)
                _report_ended(waiting)
            if requests in ready:
                message, files, _, _ = socket.recv_fds(requests, REQUEST_BYTES, 3)
                if not message:
                    return None
                process = os.fork()
                if process == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in waiting.values():
                        other.close()
                    os.close(files[2])
                    asked: dict[str, Any] = json.loads(message)
                    return asked | {"outputs": files[:2]}
                os.close(files[0])
                os.close(files[1])
                waiting[process] = socket.socket(fileno=files[2])
                waiting[process].sendall(f"{process}\n".encode())


def _report_ended(waiting: dict[int, socket.socket]) -> None:
    """Send the exit codes of the processes that have ended."""
    while waiting and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        with waiting.pop(ended[0]) as requester, suppress(BrokenPipeError):
            requester.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())


def become(request: dict[str, Any]) -> None:
    """Be the program that a request names, from here to the end of the process."""
    for target, file in enumerate(request["outputs"], start=1):
        os.dup2(file, target)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv[:] = request["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    """Import the libraries, then serve until the tests' end of the socket is closed."""
    backend.prepare()
    for name in LIBRARIES:
        if find_spec(name.partition(".")[0]) is not None:
            import_module(name)
    gc.freeze()  # the processes share these objects' memory as long as no collection touches it
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        request = serve(requests)
    if request is not None:
        become(request)


if __name__ == "__main__":
    main()
