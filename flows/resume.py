"""The flow that lets a fine-tune that crashed go on by itself, once; an automation starts it."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Completed, Scheduled, State
from pydantic import Field

from flows.prefect_logs import hide_tracebacks_of_expected_errors
from nested_core.config.section import Section
from nested_core.text.foreign_text import escape
from tasks.outcomes import Outcome

RESUMED_MESSAGE = (
    "Crashed, and goes on by itself from its last checkpoint. After a second crash press Retry."
)


class ResumeParameters(Section):
    """The flow run that crashed."""

    flow_run: UUID = Field(description="the id of the flow run that crashed")
    name: str = Field(description="what it is called")


@flow(name="resume", retries=0, flow_run_name="resume {config.name}")
def resume(config: ResumeParameters) -> State[Any]:
    """Schedule a crashed run again, unless that was done before or it has another state by now.

    An automation alone could go by the run count, which is no count of crashes: it rises with each
    wait for the device and with each Retry, and not where a process dies before its flow begins.
    """
    hide_tracebacks_of_expected_errors()
    name = escape(config.name)
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(config.flow_run).state
        if state is None or state.type != StateType.CRASHED:
            return Completed(message=f"{name} is {state.name if state else 'unknown'} by now")
        if was_resumed(client, config.flow_run):
            message = f"{name} crashed again: it stays Crashed until a Retry"
            return Completed(name=Outcome.NOT_RESUMED, message=message)
        client.set_flow_run_state(
            config.flow_run, Scheduled(name=Outcome.RESUMED, message=RESUMED_MESSAGE)
        )
    return Completed(name=Outcome.RESUMED, message=f"{name} goes on from its last checkpoint")


def was_resumed(client: SyncPrefectClient, flow_run_id: UUID) -> bool:
    """Whether a run has been scheduled again by itself after a crash."""
    states = client.read_flow_run_states(flow_run_id)
    return any(state.name == Outcome.RESUMED for state in states)
