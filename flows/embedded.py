"""The Prefect server of a run at the command line, where no PREFECT_API_URL names another.

It hears no signal of the run's terminal, for the run's last state has still to reach it, and it
ends with the run's process, however that one ends.
"""

from __future__ import annotations

import atexit
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from nested_core.errors import NestedTuneError

HOST = "127.0.0.1"
SECONDS_TO_START, SECONDS_TO_END, SECONDS_BETWEEN_LOOKS = 90.0, 5.0, 0.05
IMPORTED_BY_THE_FIRST_RUN = ("prefect.flow_engine", "prefect.task_engine")


@contextmanager
def prefect_server() -> Iterator[Callable[[], None]]:
    """Use the server that Prefect's settings name, or one that is started here.

    The block is handed what waits until the server answers: there is time for imports before. The
    one started here ends at exit, after Prefect's own threads have sent it what they hold, and
    hears no heartbeats, for nobody there would miss them.
    """
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        get_current_settings,
        temporary_settings,
    )

    if get_current_settings().api.url is not None:
        yield lambda: None
        return
    server = EmbeddedServer()
    atexit.register(server.stop)
    here = {PREFECT_API_URL: server.url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(updates=here):
        yield lambda: _import_and_wait(server)


def _import_and_wait(server: EmbeddedServer) -> None:
    """Import what Prefect would at the first run: the server takes longer to start."""
    for module in IMPORTED_BY_THE_FIRST_RUN:
        import_module(module)
    server.wait()


class EmbeddedServer:
    """A server in a process of its own, on a free port of this machine."""

    def __init__(self) -> None:
        self._port = _free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._port)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.url = f"http://{HOST}:{self._port}/api"

    def wait(self) -> None:
        """Wait until it answers; NestedTuneError where it ends or takes too long."""
        deadline = time.monotonic() + SECONDS_TO_START
        while not _is_healthy(self._port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise NestedTuneError(
                    "Prefect's embedded server did not start; what it said stands above. "
                    "`nested-tune doctor` looks for the cause, and `nested-tune train` needs no "
                    "server."
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def stop(self) -> None:
        """End it, so that it keeps what it holds; kill it where that takes too long."""
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/api/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def serve(port: int) -> None:
    """Serve until a signal comes, or the process at the other end of standard input is gone."""
    import uvicorn
    from prefect.server.api.server import create_app

    threading.Thread(target=_end_with_parent, daemon=True).start()
    app = create_app(ephemeral=True, final=True)
    uvicorn.run(app, host=HOST, port=port, log_level="error", lifespan="on")


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_END)
    os._exit(1)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
