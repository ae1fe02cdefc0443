"""The flow that catches what an event lost: verified versions that were never decided on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Completed, Failed, State
from pydantic import Field

from flows.allowed_folders import require_allowed
from flows.early_warnings import warn_of_full_disks, warn_of_old_champions
from flows.prefect_logs import hide_tracebacks_of_expected_errors
from nested_core.config.registry import AdapterName
from nested_core.config.section import Section
from nested_core.registry import list_names
from nested_core.registry.name_folders import name_exists
from nested_core.registry.promotion_policy import DAMAGED_OUTCOME
from nested_core.text.digest_format import shorten_digest
from tasks.outcomes import Outcome
from tasks.promote import promote_missed as reconcile_name


class ReconcileParameters(Section):
    """Which registry, and which of its adapters."""

    registry: str = Field(description="the registry's folder, on the worker's machine")
    names: tuple[AdapterName, ...] | None = Field(default=None, description="default: all of them")
    stale_after_nights: float | None = Field(
        default=3.0, gt=0, description="an older champion is told of; null: never"
    )


@flow(name="reconcile", retries=0, flow_run_name="reconcile {config.registry}")
def reconcile(config: ReconcileParameters) -> State[Any]:
    """Apply each version's own policy once more; running it again changes nothing.

    What is damaged keeps no other version or name from its promotion: the flow goes through all of
    them, and then ends Failed, saying what is damaged.
    """
    hide_tracebacks_of_expected_errors()
    registry = require_allowed(config.registry, "registry")
    wanted = list_names(registry) if config.names is None else config.names
    names = [name for name in wanted if name_exists(registry, name)]
    states = {name: reconcile_name(registry, name, return_state=True) for name in names}
    if config.stale_after_nights is not None:
        warn_of_old_champions(registry, names, config.stale_after_nights)
    warn_of_full_disks([registry, Path.cwd()])
    problems = [f"{name}: {state.message}" for name, state in states.items() if state.is_failed()]
    decided = {name: state.result() for name, state in states.items() if state.is_completed()}
    problems += [
        f"{name} {shorten_digest(version)}: {outcome}"
        for name, outcomes in decided.items()
        for version, outcome in outcomes.items()
        if outcome.startswith(DAMAGED_OUTCOME)
    ]
    if problems:
        return Failed(message="; ".join(problems))
    promoted = [name for name, outcomes in decided.items() if "promoted" in outcomes.values()]
    name = Outcome.PROMOTED if promoted else None
    message = f"promoted: {', '.join(promoted) or 'nothing'}"
    if empty := sorted({*wanted} - {*names}):  # the hour comes before an adapter's first night
        message += f"; nothing is registered yet as {', '.join(empty)}"
    return Completed(name=name, message=message)
