"""The Prefect server of a run at the command line, where no PREFECT_API_URL names another.

It hears no signal of the run's terminal, for the run's last state has still to reach it, and it
ends with the run's process, however that one ends.
"""

from __future__ import annotations

import atexit
import gc
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module

from nested_core.errors import NestedTuneError
from nested_core.process.our_packages import RUN_MODULE

HOST = "127.0.0.1"
SECONDS_TO_START, SECONDS_TO_END, SECONDS_BETWEEN_LOOKS = 90.0, 5.0, 0.05
SECONDS_BETWEEN_COLLECTIONS = 0.5  # of young objects
YOUNG_COLLECTIONS = 60  # between two collections of all objects
API_URL_VARIABLE = "PREFECT_API_URL"
IMPORTED_BY_THE_FIRST_RUN = (
    *("prefect.flow_engine", "prefect.task_engine"),
    *("prefect.utilities.visualization", "fastapi.encoders"),
)


@contextmanager
def prefect_server() -> Iterator[Callable[[], None]]:
    """Use the server that Prefect's settings name, or one that is started here.

    The block is handed what waits until the server answers: there is time for imports before. The
    one started here ends at exit, after Prefect's own threads have sent it what they hold, and
    hears no heartbeats, for nobody there would miss them. Its process is begun before the settings
    are known, because both take seconds to import; it serves once they name no other.
    """
    server = None if os.environ.get(API_URL_VARIABLE) else LocalServer()
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        get_current_settings,
        temporary_settings,
    )

    if server is None or get_current_settings().api.url is not None:
        if server is not None:
            server.stop()
        yield _require_server
        return
    server.serve()
    here = {PREFECT_API_URL: server.url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(updates=here):
        yield lambda: _import_and_wait(server)


def _require_server() -> None:
    """NestedTuneError where the server that the settings name cannot be reached."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
        if error is not None:
            raise NestedTuneError(
                f"The Prefect server at {client.api_url} does not answer ({error!s:.200}). Start "
                f"it, or unset {API_URL_VARIABLE} to run with one of its own; `nested-tune "
                f"doctor` looks at it, and `nested-tune train` needs none."
            )


def _import_and_wait(server: LocalServer) -> None:
    """Import what Prefect would at the first run: the server takes longer to start."""
    for module in IMPORTED_BY_THE_FIRST_RUN:
        import_module(module)
    server.wait()


class LocalServer:
    """A server in a process of its own, on a port of its own, until this one ends.

    It is handed the bound socket: it takes seconds to listen there, and a port that was only chosen
    may be another run's by then, whose server would be taken for this one.
    """

    def __init__(self) -> None:
        heard, self._voice = os.pipe()
        with socket.socket() as bound:
            bound.bind((HOST, 0))
            self._port: int = bound.getsockname()[1]
            socket_descriptor = bound.fileno()
            self._process = subprocess.Popen(
                [sys.executable, *RUN_MODULE, __name__, str(socket_descriptor)],
                stdin=heard,
                pass_fds=[socket_descriptor],
                start_new_session=True,
            )
        os.close(heard)
        self.url = f"http://{HOST}:{self._port}/api"
        atexit.register(self.stop)

    def serve(self) -> None:
        """Let it serve: until now it imports, and touches no database."""
        with suppress(BrokenPipeError):  # it has ended, and `wait` says so
            os.write(self._voice, b"\n")

    def wait(self) -> None:
        """Wait until it answers; NestedTuneError where it ends or takes too long."""
        deadline = time.monotonic() + SECONDS_TO_START
        while not _is_healthy(self._port):
            if self._process.poll() is not None:
                raise _failed_start("ended; its output is above")
            if time.monotonic() > deadline:
                self._process.kill()
                raise _failed_start(f"does not answer after {SECONDS_TO_START:.0f} seconds")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def stop(self) -> None:
        """End it, so that it keeps what it holds; kill it where that takes too long."""
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _failed_start(problem: str) -> NestedTuneError:
    return NestedTuneError(
        f"The Prefect server of this run {problem}. `nested-tune doctor` looks for the cause, and "
        f"`nested-tune train` needs no server. If the machine was busy, give the command again."
    )


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/api/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def main(socket_descriptor: int) -> None:
    """Serve on a bound socket, given by its descriptor, once asked to.

    It ends at a signal, and where who started this process is gone.
    """
    is_asked_to_serve = threading.Event()
    threading.Thread(target=_follow_parent_requests, args=(is_asked_to_serve,), daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app

    is_asked_to_serve.wait()
    app = create_app(ephemeral=True, final=True)
    collect_garbage_in_a_thread()
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    server.run(sockets=[socket.socket(fileno=socket_descriptor)])


def collect_garbage_in_a_thread() -> None:
    """Collect garbage in another thread from now on: the event loop's could wait in it a minute.

    A statement that fails leaves its cursor in a cycle. Freeing one waits for the lock of its
    connection (sqlite3_reset), and a thread that begins a transaction holds that lock until another
    connection's transaction ends, or until Prefect's limit of 60 seconds. The event loop has to end
    that transaction: if it is what waits, no request is answered for a minute.
    """
    gc.disable()
    gc.freeze()  # what is imported stays
    threading.Thread(target=_collect_garbage, daemon=True).start()


def _collect_garbage() -> None:
    while True:
        for _ in range(YOUNG_COLLECTIONS):
            time.sleep(SECONDS_BETWEEN_COLLECTIONS)
            gc.collect(1)
        gc.collect()


def _follow_parent_requests(is_asked_to_serve: threading.Event) -> None:
    """A byte from standard input asks to serve; the end of it, to end."""
    while os.read(sys.stdin.fileno(), 1):
        is_asked_to_serve.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_END)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
