"""The flow that catches what an event lost: verified versions that were never decided on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Completed, State
from pydantic import Field

from nested_core.config_section import Section
from nested_core.registry import list_names
from tasks.promote import reconcile as reconcile_name


class ReconcileParameters(Section):
    """Which registry, and which of its adapters."""

    registry: str
    names: tuple[str, ...] | None = Field(default=None, description="default: all of them")


@flow(name="reconcile", retries=0, flow_run_name="reconcile {config.registry}")
def reconcile(config: ReconcileParameters) -> State[Any]:
    """Apply each version's own policy once more; running it again changes nothing."""
    registry = Path(config.registry)
    names = list_names(registry) if config.names is None else config.names
    outcomes = {name: reconcile_name(registry, name) for name in names}
    promoted = [name for name, decided in outcomes.items() if "promoted" in decided.values()]
    return Completed(message=f"promoted: {', '.join(promoted) or 'nothing'}", data=outcomes)
