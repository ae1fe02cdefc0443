"""A cancel or suspension of which no worker tells: the run asks its server by itself.

A cancel comes from the worker as SIGTERM. A worker listens for each of its runs by itself, and no
longer where its server was away for about a minute meanwhile (prefect 3.9.1,
_internal/_observation_delivery.py: it connects again, until three looks in a row found no server).
Of a suspension Prefect tells nobody but the run's own engine, which acts on it between tasks alone:
training would go on to its end.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause

from tasks.prefect_server import tolerating_server_outage

SECONDS_BETWEEN_LOOKS = 20.0
SUSPENDED = "Suspended"  # the name of a paused state whose process ends; Resume begins another


@contextmanager
def stopping_where_cancelled() -> Iterator[CancelWatch]:
    """Send SIGTERM to this process once its flow run is cancelled or suspended, in the block.

    For a block in which SIGTERM is handled; signals reach the main thread alone: in any other the
    block only runs.
    """
    watch = CancelWatch()
    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    look = copy_context().run  # in the context of the run, whose logger is used
    threading.Thread(target=look, args=(watch.look,), name="cancels", daemon=True).start()
    try:
        yield watch
    finally:
        watch.end()


class CancelWatch:
    """Looks at the state of this process's flow run until it is stopped or the watch ends.

    suspended: the state in which the run was suspended; None while it is not.
    """

    def __init__(self) -> None:
        self.suspended: State[None] | None = None
        self._flow_run = UUID(str(runtime.flow_run.id))
        self._is_over = threading.Event()
        self._lock = threading.Lock()  # no signal is sent once the block has ended

    def look(self) -> None:
        """Look every SECONDS_BETWEEN_LOOKS; training goes on where the server is away."""
        with get_client(sync_client=True) as client:
            while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
                with tolerating_server_outage("whether the run is cancelled is asked later"):
                    state = client.read_flow_run(self._flow_run).state
                    if state is not None and state.is_paused() and state.name == SUSPENDED:
                        self.suspended = state
                        self._stop("suspended")
                        return
                    if state is not None and (state.is_cancelling() or state.is_cancelled()):
                        self._stop("cancelled")
                        return

    def raise_if_suspended(self) -> None:
        """Raise Prefect's Pause if the run is suspended: it stays so, and its process ends."""
        if self.suspended is not None:
            raise Pause(state=self.suspended)

    def _stop(self, change: str) -> None:
        with self._lock:
            if not self._is_over.is_set():
                get_run_logger().info("The run is %s: it ends, and keeps what is done.", change)
                os.kill(os.getpid(), signal.SIGTERM)

    def end(self) -> None:
        """End the watch."""
        with self._lock:
            self._is_over.set()
