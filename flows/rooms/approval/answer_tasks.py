"""A person's answer about a version, recorded in the registry by tasks that are tried again."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from nested_core.registry import Decision
from nested_core.registry.promotion_policy import describe_promotion
from nested_core.rooms.approval import answers
from tasks.events import announce_changes
from tasks.promote import announce_promotion, read_origin
from tasks.retrying import REGISTRY_RETRY_DELAYS, retried_task


@retried_task("promote-approved", "promote-approved {name} {version:.12}", REGISTRY_RETRY_DELAYS)
def promote_approved(
    path: Path, name: str, version: str, by: str, expected_champion: str | None
) -> Decision:
    """Promote what a person has approved, while the champion is the one it was shown against."""
    done = answers.approve(
        path, name, version, by=by, expected_champion=expected_champion, origin=read_origin()
    )
    if warning := describe_promotion(path, name, done).warning:
        get_run_logger().warning("%s", warning)
    return announce_promotion(path, name, done)


@retried_task("decline", "decline {name} {version:.12}", REGISTRY_RETRY_DELAYS)
def decline(path: Path, name: str, version: str, by: str, reason: str | None) -> None:
    """Record in the history that a person did not approve a version, and why."""
    answers.decline(path, name, version, by=by, reason=reason, origin=read_origin())
    announce_changes(path, name)
