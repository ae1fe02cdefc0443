"""Python programs run in processes forked from one that has imported the large libraries already.

Importing transformers and mlx_lm takes two seconds of CPU time, and this library's part of a run
one more: more than most tests ask of a process that they start. The server is a plain process
without threads of its own, which imports no Prefect and no command. A test whose subject is a
process from its start (signals, imports, each command once) starts a real one.

What a forked process starts by `sys.executable`, as the gate does for its proof, is forked too
where FORKED_PROGRAMS names it; a test can ask the same of its own process (`forking_python`).
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import selectors
import shutil
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
from nested_core.process.command_parent import PARENT_VARIABLE

LIBRARIES = (  # in the order in which they are imported; `backend` comes before all of them
    "mlx_lm.utils",
    "mlx_lm.tuner.lora",
    "mlx_lm.models.llama",
    "transformers.models.llama.configuration_llama",
    "pydantic",
    "rich.table",
    "yaml",
    "pandas",
    "polars",
    "typeguard",  # pandera imports it; pandera itself reads the environment when it is imported
    "nested_core.pipeline.finetune",
)
FORKED_PROGRAMS = (  # a file's name or a module
    "mlx_lm_program.py",
    "nested_core.models.tokenizer_cell_program:do_job",
    "limited.py",
    "astray.py",
    "nested_core.rooms.ranks.rank_worker",
    "benchmarks.time_to_loss.worker",
)
REQUEST_BYTES = 2**20
SOCKET_NAME, STAND_IN_NAME = "socket", "python"
SECONDS_TO_END = 10.0

# In place of the interpreter: has the server run a program, or is the interpreter for any other.
STAND_IN = """#!{python} -IS
import json, os, signal, socket, sys

words = sys.argv[1:]
program = words[1] if words[0] in ("-P", "-m") else words[0]
if os.path.basename(program) == "child_main.py":
    program = words[2]
if os.path.basename(program) not in {programs!r} or "LD_PRELOAD" in os.environ:
    os.execv({python!r}, [{python!r}, *words])
request = {{"command": words, "cwd": os.getcwd(), "env": dict(os.environ)}}
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, {request_bytes})
server.connect({address!r})
socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
process = int(server.recv(64))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(process, number))
code = int(server.recv(64))
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def python(
    *command: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 900,
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
        from tests.child_output import note_output  # it imports pytest, which the server has not

        done = subprocess.CompletedProcess(words, code, stdout.read(), stderr.read())
        note_output(" ".join(words), code, done.stdout, done.stderr)
        return done


def forking_python() -> str:
    """What may stand in for `sys.executable`: FORKED_PROGRAMS that it runs are forked."""
    return str(start_server().stand_in) if sys.platform == "linux" else sys.executable


class ForkServer:
    """The server's process, seen from the tests; it ends when its standard input does.

    A connection is a request, and its two answers: the process id, and later the exit code. The
    process is killed when the connection is closed before.
    """

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="nested-tune-fork-"))
        self._address = str(folder / SOCKET_NAME)
        self.stand_in = folder / STAND_IN_NAME
        self.stand_in.write_text(
            STAND_IN.format(
                python=sys.executable,
                programs=FORKED_PROGRAMS,
                request_bytes=REQUEST_BYTES,
                address=self._address,
            )
        )
        self.stand_in.chmod(0o700)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self._address)
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__)), str(listener.fileno()), str(folder)],
                cwd=Path(__file__).parents[1],
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
        atexit.register(self._end, os.getpid(), folder)

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
        with (
            open(os.devnull, "rb") as nothing,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server,
        ):
            server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_BYTES)
            server.connect(self._address)
            files = [nothing.fileno(), *outputs]
            socket.send_fds(server, [json.dumps(request).encode()], files)
            process = int(server.recv(64))
            server.settimeout(timeout)
            try:
                return int(server.recv(64))
            except TimeoutError as error:
                os.kill(process, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, timeout) from error

    def _end(self, process: int, folder: Path) -> None:
        """End the server at the end of the process given, not of one that was forked from it."""
        if os.getpid() == process:
            with suppress(subprocess.TimeoutExpired):
                self._process.communicate(timeout=SECONDS_TO_END)  # closes its standard input
            shutil.rmtree(folder, ignore_errors=True)


_starting = threading.Lock()


@cache
def _start_server() -> ForkServer:
    return ForkServer()


def start_server() -> ForkServer:
    """The one server of this process, started when it is first needed."""
    with _starting:
        return _start_server()


def serve(listener: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each connection, until standard input ends.

    Returns None in the server, at its end, and the request in each process that was forked for one.
    """
    connections: dict[int, socket.socket] = {}  # by the process that was forked for each
    woken, wake_up = socket.socketpair()
    wake_up.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake_up.fileno())
    with woken, wake_up, selectors.DefaultSelector() as selector:
        for source in (listener, woken, sys.stdin):
            selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is woken:
                    woken.recv(2**12)
                    _report_ended(connections, selector)
                elif key.fileobj is listener:
                    connection, _ = listener.accept()
                    request = _fork_for(connection, connections)
                    if request is not None:
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        return request
                    selector.register(connection, selectors.EVENT_READ)
                elif _kill_abandoned(connections, key.fileobj):
                    selector.unregister(key.fileobj)


def _fork_for(
    connection: socket.socket, connections: dict[int, socket.socket]
) -> dict[str, Any] | None:
    """Fork a process for a connection's request, which is returned in the new process alone."""
    message, files, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 3)
    process = os.fork() if message else 0
    if process == 0 and message:
        for inherited in (connection, *connections.values()):
            inherited.close()
        request: dict[str, Any] = json.loads(message)
        return request | {"files": files}
    for file in files:
        os.close(file)
    if process:
        connections[process] = connection
        _answer(connection, process)
    return None


def _answer(connection: socket.socket, number: int) -> None:
    with suppress(OSError):  # whoever asked has gone
        connection.send(str(number).encode())


def _report_ended(connections: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Send the exit codes of the processes that have ended."""
    while connections and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        with connections.pop(ended[0]) as connection:
            with suppress(KeyError):  # its requester has gone
                selector.unregister(connection)
            _answer(connection, os.waitstatus_to_exitcode(ended[1]))


def _kill_abandoned(connections: dict[int, socket.socket], closed: object) -> bool:
    """Kill the process of a connection that its requester has closed; False if it has ended."""
    for process, connection in connections.items():
        if connection is closed:
            os.kill(process, signal.SIGKILL)
            return True
    return False


def become(request: dict[str, Any], executable: str) -> None:
    """Be the program that a request names, from here to the end of the process."""
    for target, file in enumerate(request["files"]):
        os.dup2(file, target)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # What trains is the command itself, not the small parent that would start it once more.
    own, others = socket.socketpair()
    os.environ[PARENT_VARIABLE] = f"{os.getppid()}:{own.detach()}"
    others.detach()  # open for as long as this process lives
    sys.executable = executable
    words = request["command"]
    sys.argv[:] = words[1:] if words[0] in ("-P", "-m") else words
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def main(listener_file: str, folder: str) -> None:
    """Import the libraries, then serve until standard input, which the tests hold, ends."""
    backend.prepare()
    for name in LIBRARIES:
        if find_spec(name.partition(".")[0]) is not None:
            import_module(name)
    gc.freeze()  # the processes share these objects' memory as long as no collection touches it
    with socket.socket(fileno=int(listener_file)) as listener:
        request = serve(listener)
    if request is not None:
        become(request, str(Path(folder, STAND_IN_NAME)))


if __name__ == "__main__":
    main(*sys.argv[1:])
