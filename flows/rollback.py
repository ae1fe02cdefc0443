"""The flow that goes back to an earlier version; automation does not promote what it left again."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.states import Completed, State
from pydantic import Field

from flows.flow_runs.allowed_folders import require_allowed
from flows.flow_runs.prefect_logs import hide_tracebacks_of_expected_errors
from nested_core.config.adapter_names import NAME_PATTERN
from nested_core.config.section import Section
from nested_core.registry import read_champion
from nested_core.text.digest_format import shorten_digest
from tasks.outcomes import Outcome
from tasks.promote import roll_back


class RollbackParameters(Section):
    """Which adapter, in which registry, and back to what."""

    registry: str = Field(description="the registry's folder, on the worker's machine")
    name: str = Field(pattern=f"^{NAME_PATTERN.pattern}$", description="the adapter's name in it")
    to: str | None = Field(default=None, description="default: the champion before this one")
    by: str = Field(min_length=1, description="who decides; it stands in the history")


@flow(name="rollback", retries=0, flow_run_name="rollback {config.name}")
def rollback(config: RollbackParameters) -> State[Any]:
    """Move the champion back; the message says what became of it."""
    hide_tracebacks_of_expected_errors()
    registry = require_allowed(config.registry, "registry")
    champion = read_champion(registry, config.name)
    outcome = roll_back(registry, config.name, config.to, config.by, champion)
    if outcome != "rolled_back":
        return Completed(message=outcome)
    now = read_champion(registry, config.name)
    versions = f"from {_shorten_or_none(champion)} to {_shorten_or_none(now)}"
    return Completed(name=Outcome.ROLLED_BACK, message=f"rolled_back {versions} by {config.by}")


def _shorten_or_none(version: str | None) -> str:
    return "none" if version is None else shorten_digest(version)
