"""A fine-tune's flow run in Prefect's lists: its name and its tags."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from pydantic import BaseModel

from nested_core.text.foreign_text import escape
from tasks.prefect_server import asking_server

RESUMED_TAG = "resumed"  # of a run that went on after a crash, or by the Retry button


def name_flow_run() -> str:
    """Prefect's callback that names a run: "support-bot, 21 Nov 02:00"."""
    return format_flow_run_name(*_read_own_run())  # Prefect calls it within the run's context


def _read_own_run() -> tuple[FlowRun, Mapping[str, Any]]:
    """This process's run, and its parameters."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("A flow run is named and tagged by itself.")
    return context.flow_run, context.parameters or {}


def format_flow_run_name(flow_run: FlowRun, parameters: Mapping[str, object]) -> str:
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
    flow_run, parameters = _read_own_run()
    tags = {*flow_run.tags, read_adapter_name(parameters), find_trigger(flow_run)}
    tags |= {RESUMED_TAG} if (flow_run.run_count or 1) > 1 else set()
    with asking_server("the run has no tags of its adapter and of what started it") as client:
        client.update_flow_run(flow_run.id, tags=sorted(tags))
