"""A flow run that waits for the device shows in its state for which process."""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

import httpx
from prefect import get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.states import Running

from tasks.outcomes import Outcome

_WAITING: set[str] = set()  # ids of this process's flow runs that wait


def show_waiting(message: str) -> None:
    """Log what a step waits for, and put it into the state of its flow run.

    For the server that is one more start of the run (its run count), and so is its end.
    """
    get_run_logger().info("%s", message)
    _WAITING.add(str(runtime.flow_run.id))
    _set_running(Outcome.WAITING, message)


def end_waiting() -> None:
    """Say that the flow run is running again, where it has waited."""
    if str(runtime.flow_run.id) in _WAITING:
        _WAITING.discard(str(runtime.flow_run.id))
        _set_running("Running", None)


def _set_running(name: str, message: str | None) -> None:
    # What is shown may be missing where the server cannot be reached; the run goes on.
    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        state: State[None] = Running(name=name, message=message)
        client.set_flow_run_state(UUID(str(runtime.flow_run.id)), state)
