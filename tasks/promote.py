"""The tasks that move the champion: promote, as policy or a person asks, and roll back."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from nested_core import policy, registry
from nested_core.config_publishing import RegistrySection
from nested_core.registry import Promotion
from tasks.events import emit
from tasks.retrying import retry_on_passing_error


@task(
    name="promote",
    task_run_name="promote {section.name} {version:.12}",
    retries=3,
    retry_delay_seconds=[2, 5, 15],
    retry_condition_fn=retry_on_passing_error,
    cache_policy=NO_CACHE,
)
def promote(section: RegistrySection, version: str, expected_champion: str | None) -> str:
    """Promote by policy; return the outcome, or why nothing was promoted."""
    done = policy.promote_by_policy(section, version, expected_champion)
    return _tell(str(section.name), version, done)


@task(
    name="promote-recorded",
    task_run_name="promote-recorded {name} {version:.12}",
    retries=3,
    retry_delay_seconds=[2, 5, 15],
    retry_condition_fn=retry_on_passing_error,
    cache_policy=NO_CACHE,
)
def promote_recorded(path: Path, name: str, version: str) -> str:
    """Promote by the policy that was recorded with the version."""
    return _tell(name, version, policy.promote_as_recorded(path, name, version))


@task(
    name="promote-approved",
    task_run_name="promote-approved {name} {version:.12}",
    retries=3,
    retry_delay_seconds=[2, 5, 15],
    retry_condition_fn=retry_on_passing_error,
    cache_policy=NO_CACHE,
)
def promote_approved(
    path: Path, name: str, version: str, by: str, expected_champion: str | None
) -> str:
    """Promote what a person has approved, while the champion is the one it was shown against."""
    done = registry.promote(path, name, version, by=by, expected_champion=expected_champion)
    return _tell(name, version, done)


@task(
    name="roll-back",
    task_run_name="roll-back {name}",
    retries=3,
    retry_delay_seconds=[2, 5, 15],
    retry_condition_fn=retry_on_passing_error,
    cache_policy=NO_CACHE,
)
def roll_back(path: Path, name: str, to: str | None, by: str) -> str:
    """Make `to`, or what the last change replaced, the champion again."""
    return _tell(name, to or "the version before", registry.rollback(path, name, to=to, by=by))


@task(
    name="reconcile",
    task_run_name="reconcile {name}",
    retries=3,
    retry_delay_seconds=[2, 5, 15],
    retry_condition_fn=retry_on_passing_error,
    cache_policy=NO_CACHE,
)
def reconcile(path: Path, name: str) -> dict[str, str]:
    """Promote what an event got lost for; the outcome of each version that never was champion."""
    before = registry.read_champion(path, name)
    outcomes = policy.reconcile(path, name)
    for version, outcome in outcomes.items():
        get_run_logger().info("%s %s: %s", name, version[:12], outcome)
        if outcome == "promoted":
            emit("promoted", name, {"version": version, "previous": before})
    return outcomes


def _tell(name: str, version: str, done: Promotion | str) -> str:
    """Log what became of it, and emit an event where the champion has moved."""
    outcome = done if isinstance(done, str) else done.outcome
    get_run_logger().info("%s %s: %s", name, version[:12], outcome)
    if isinstance(done, Promotion) and outcome in ("promoted", "rolled_back"):
        payload = {"version": done.version, "previous": done.previous}
        emit("promoted" if outcome == "promoted" else "rolled_back", name, payload)
    return outcome
