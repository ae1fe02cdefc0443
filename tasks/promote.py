"""The tasks that move the champion: promote, as policy or a person asks, and roll back."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from nested_core import registry
from nested_core.config.registry import RegistrySection
from nested_core.registry import Promotion, promotion_policy
from nested_core.registry.promotion_policy import registry_location
from nested_core.text.digest_format import shorten_digest
from tasks.champion_page import publish_champion
from tasks.events import emit_adapter_event
from tasks.retrying import REGISTRY_RETRY_DELAYS, retried_task


@retried_task("promote", "promote {section.name} {version:.12}", REGISTRY_RETRY_DELAYS)
def promote(section: RegistrySection, version: str, expected_champion: str | None) -> str:
    """Promote by policy; return the outcome, or why nothing was promoted."""
    done = promotion_policy.promote_by_policy(section, version, expected_champion)
    registry_path, name = registry_location(section)
    return _announce_promotion(registry_path, name, version, done)


@retried_task("promote-recorded", "promote-recorded {name} {version:.12}", REGISTRY_RETRY_DELAYS)
def promote_by_recorded_policy(path: Path, name: str, version: str) -> str:
    """Promote by the policy that was recorded with the version."""
    return _announce_promotion(
        path, name, version, promotion_policy.promote_by_recorded_policy(path, name, version)
    )


@retried_task("promote-approved", "promote-approved {name} {version:.12}", REGISTRY_RETRY_DELAYS)
def promote_approved(
    path: Path, name: str, version: str, by: str, expected_champion: str | None
) -> str:
    """Promote what a person has approved, while the champion is the one it was shown against."""
    done = registry.promote(path, name, version, by=by, expected_champion=expected_champion)
    warning = promotion_policy.warn_if_worse(path, name, done)
    if warning is not None:
        get_run_logger().warning("%s", warning)
    return _announce_promotion(path, name, version, done)


@retried_task("roll-back", "roll-back {name}", REGISTRY_RETRY_DELAYS)
def roll_back(path: Path, name: str, to: str | None, by: str, champion: str | None) -> str:
    """Make `to`, or the champion before this one, the champion again.

    `champion` is the one to leave: a try after one that failed late does not go back twice.
    """
    done = registry.rollback(path, name, to=to, by=by, expected_champion=champion)
    return _announce_promotion(path, name, done.version, done)


@retried_task("reconcile", "reconcile {name}", REGISTRY_RETRY_DELAYS)
def promote_missed(path: Path, name: str) -> dict[str, str]:
    """Promote what an event got lost for; the outcome of each version that never was champion."""
    before = registry.read_champion(path, name)
    outcomes = promotion_policy.promote_missed_versions(path, name)
    for version, outcome in outcomes.items():
        get_run_logger().info("%s %s: %s", name, shorten_digest(version), outcome)
        if outcome == "promoted":
            emit_adapter_event("promoted", name, {"version": version, "previous": before})
            publish_champion(path, name)
    return outcomes


def _announce_promotion(path: Path, name: str, version: str, done: Promotion | str) -> str:
    """Log what became of it; where the champion has moved, emit an event and publish its page."""
    outcome = done if isinstance(done, str) else done.outcome
    get_run_logger().info("%s %s: %s", name, shorten_digest(version), outcome)
    if isinstance(done, Promotion) and outcome in ("promoted", "rolled_back"):
        payload = {"version": done.version, "previous": done.previous}
        emit_adapter_event("promoted" if outcome == "promoted" else "rolled_back", name, payload)
        publish_champion(path, name)
    return outcome
