"""The flow that goes back to an earlier version; automation does not promote what it left again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Completed, State
from pydantic import Field

from flows.allowed_folders import require_allowed
from flows.prefect_logs import hide_tracebacks_of_expected_errors
from nested_core.config.adapter_names import NAME_PATTERN
from nested_core.config.section import Section
from nested_core.errors import ConfigError
from nested_core.registry import read_champion, read_champion_changes
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
    if config.to is not None:
        _require_former_champion(registry, config.name, config.to)
    outcome = roll_back(registry, config.name, config.to, config.by, champion)
    if outcome != "rolled_back":
        return Completed(message=outcome)
    now = read_champion(registry, config.name)
    versions = f"from {_shorten_or_none(champion)} to {_shorten_or_none(now)}"
    return Completed(name=Outcome.ROLLED_BACK, message=f"rolled_back {versions} by {config.by}")


def _require_former_champion(registry: Path, name: str, version: str) -> None:
    """Raise ConfigError for a version that was never promoted: parameters go back, and not past."""
    changes = read_champion_changes(registry, name)
    former = {change.version for change in changes if change.version is not None}
    if not version or not any(each.startswith(version) for each in former):
        raise ConfigError(
            f"rollback.to: {version:.80} was never champion of {name}, and a flow goes back to "
            f"former champions alone. `nested-tune rollback {name} --to` takes any version."
        )


def _shorten_or_none(version: str | None) -> str:
    return "none" if version is None else shorten_digest(version)
