"""The task that adds a verified adapter to the registry."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from nested_core.config import FineTuneConfig
from nested_core.publishing import register_run
from nested_core.run_directory import RunDirectory
from tasks.retrying import retry_on_passing_error


@task(
    name="register",
    task_run_name="register {config.registry.name}",
    retries=3,
    retry_delay_seconds=[2, 5, 15],
    retry_condition_fn=retry_on_passing_error,
    cache_policy=NO_CACHE,
)
def register(config: FineTuneConfig, run_dir: Path, champion: str | None) -> str:
    """Register the run's adapter; return its version. Doing it twice changes nothing.

    `champion` is the one that stood when the run was judged.
    """
    version = register_run(config, RunDirectory(run_dir), champion)
    get_run_logger().info("Registered %s as version %s.", config.registry.name, version[:12])
    return version
