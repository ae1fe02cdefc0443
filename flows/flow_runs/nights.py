"""A night's flow run: its name, tags and state in Prefect's lists; whether another is at work.

A second night of one adapter does not train: the run that comes to it looks, and ends as
"Skipped: another night". Prefect's own answer, a deployment's concurrency limit with CANCEL_NEW,
does not see a second night behind a pool that runs one at a time: no worker asks for it before the
first has ended. And such a limit is a lease that the training has to renew: a server that is away
for longer than a lease lasts (300 seconds) ends a live training without a checkpoint. A run looks
at others here, and changes none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.states import Completed, State
from pydantic import BaseModel

from flows.flow_runs.watchers import list_watchers
from nested_core.config.resume import read_run_config
from nested_core.records.outcome_names import Outcome
from nested_core.storage.run_directory import find_run_of
from nested_core.text.foreign_text import escape
from tasks.prefect_server import asking_server, flow_runs_in

RESUMED_TAG = "resumed"  # of a run that went on after a crash, or by the Retry button


def name_flow_run() -> str:
    """Prefect's callback that names a run: "support-bot, 21 Nov 02:00"."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:  # Prefect calls it within the run's context
        raise RuntimeError("A flow run is named while it begins.")
    return format_flow_run_name(context.flow_run, context.parameters or {})


def format_flow_run_name(flow_run: FlowRun, parameters: Mapping[str, Any]) -> str:
    """The adapter and the time (UTC) that a run was due.

    A run that is tried again keeps the name that it has.
    """
    adapter = read_adapter_name(parameters)
    if flow_run.name.startswith(f"{adapter}, "):
        return flow_run.name
    due = (flow_run.expected_start_time or flow_run.created or datetime.now(UTC)).astimezone(UTC)
    return f"{adapter}, {due.day} {due:%b %H:%M}"


def read_adapter_name(parameters: Mapping[str, Any]) -> str:
    """The registry's name in the parameters of a fine-tune; without one, the base model's."""
    config = parameters.get("config") or {}
    values = config.model_dump() if isinstance(config, BaseModel) else dict(config)
    name = (values.get("registry") or {}).get("name")
    return escape(name or PurePath(str(values.get("model") or "fine-tune")).name)


def find_trigger(flow_run: FlowRun) -> str:
    """What started a run: "schedule", "manual", or the "command" `nested-tune run`."""
    if flow_run.deployment_id is None:
        return "command"
    return "schedule" if flow_run.auto_scheduled else "manual"


def tag_flow_run() -> None:
    """Add to the tags of this process's run: the adapter's name, the trigger, and RESUMED_TAG."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("A flow run is tagged by itself.")
    flow_run = context.flow_run
    tags = {*flow_run.tags, read_adapter_name(context.parameters or {}), find_trigger(flow_run)}
    tags |= {RESUMED_TAG} if (flow_run.run_count or 1) > 1 else set()
    with asking_server("the run has no tags of its adapter and of what started it") as client:
        client.update_flow_run(flow_run.id, tags=sorted(tags))


MAX_NIGHTS_READ = 20
AT_WORK = (StateType.RUNNING, StateType.PAUSED)


def find_other_night() -> str | None:
    """Why this night need not train, in a sentence; None where it is to train.

    Another night of its deployment is at work. A run that is tried again, or was not started by a
    schedule, is to train.
    """
    context = FlowRunContext.get()
    own = None if context is None else context.flow_run
    if own is None or own.deployment_id is None or not own.auto_scheduled:
        return None
    if (runtime.flow_run.run_count or 1) > 1:
        return None
    running = flow_runs_in(AT_WORK, deployment_id={"any_": [own.deployment_id]})
    nights: list[FlowRun] = []
    with asking_server("other runs of this adapter are not checked") as client:
        nights = client.read_flow_runs(
            flow_run_filter=running, sort=FlowRunSort.START_TIME_ASC, limit=MAX_NIGHTS_READ
        )
    own = next((night for night in nights if night.id == own.id), own)  # it has a start there
    return describe_other_night(own, nights)


def describe_other_night(own: FlowRun, nights: list[FlowRun]) -> str | None:
    """The sentence about the first of `nights` in whose favour `own` is skipped, if there is one.

    Of two nights that are at work the one that began first trains, whenever it was due; of two that
    began at once the lower id. One that waits is no reason: it will see this one at work. One that
    was suspended after it began is at work: Resume goes on with it.
    """
    for other in nights:
        if other.id == own.id or other.start_time is None or own.start_time is None:
            continue
        if (other.start_time, other.id) > (own.start_time, own.id):
            continue
        named = f"flow run {other.name!r} ({other.id})"
        if other.state_type == StateType.RUNNING:
            return f"another run of this adapter is active, {named}"
        if other.state_type == StateType.PAUSED and find_run_of(other.id) is not None:
            return f"another run of this adapter is suspended, {named}: resume or cancel it"
    return None


def tell_night(night: UUID, outcome: Outcome, message: str) -> None:
    """Say what became of the question that a night asked: in its state's name, and to the watchers.

    `night` is the fine-tune's flow run. Its state stays of the type Completed, and when it ended
    stays as it was. Watchers are told where the run's folder is on this machine.
    """
    with asking_server("the run does not show the answer to its question") as client:
        state = client.read_flow_run(night).state
        if state is None or state.type != StateType.COMPLETED or state.name == outcome:
            return
        told: State[None] = Completed(name=outcome, message=f"{state.message}; {message}")
        client.set_flow_run_state(night, told, force=True)
        run = find_run_of(night)
        if run is not None:
            config = read_run_config(run)
            for watcher in list_watchers():
                watcher.answer(config, run, night, told)
