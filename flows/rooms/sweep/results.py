"""The task that compares the runs of a sweep: a table of all, and the best that was verified."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from nested_core.rooms.sweep.page import SweepRunResult, choose_best_run
from tasks.artifact_client import ArtifactClient


@task(name="collect", task_run_name="collect the sweep's results", cache_policy=NO_CACHE)
def pick_best_run(outcomes: Sequence[SweepRunResult]) -> SweepRunResult | None:
    """Show all as a table; return the verified run of the lowest validation loss, or None."""
    rows = [
        outcome.point
        | {"state": outcome.state, "val_loss": outcome.val_loss, "result": outcome.message}
        for outcome in outcomes
    ]
    description = f"{len(rows)} runs of the sweep: settings, outcome and validation loss"
    with ArtifactClient() as artifacts:
        artifacts.publish_table("sweep-results", rows, description)
    return choose_best_run(outcomes)
