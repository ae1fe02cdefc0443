"""The task that makes a registered version the champion, where the policy asks for it."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from nested_core.config import FineTuneConfig
from nested_core.publishing import promote_by_policy
from nested_core.run_directory import RunDirectory
from tasks.retrying import retry_on_passing_error


@task(
    name="promote",
    retries=3,
    retry_delay_seconds=[2, 5, 15],
    retry_condition_fn=retry_on_passing_error,
    cache_policy=NO_CACHE,
)
def promote(
    config: FineTuneConfig, run_dir: Path, version: str, expected_champion: str | None
) -> str:
    """Promote by policy; return the outcome, or why nothing was promoted."""
    done = promote_by_policy(config, RunDirectory(run_dir), version, expected_champion)
    outcome = done if isinstance(done, str) else done.outcome
    get_run_logger().info("Promotion of %s: %s", version[:12], outcome)
    return outcome
