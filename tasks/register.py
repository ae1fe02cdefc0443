"""The task that adds a verified adapter to the registry."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from nested_core.config.schema import FineTuneConfig
from nested_core.pipeline.publishing import register_run
from nested_core.storage.run_directory import RunDirectory
from tasks.retrying import REGISTRY_DELAYS, retried_task


@retried_task("register", "register {config.registry.name}", REGISTRY_DELAYS)
def register(config: FineTuneConfig, run_dir: Path, champion: str | None) -> str:
    """Register the run's adapter; return its version. Doing it twice changes nothing.

    `champion` is the one that stood when the run was judged.
    """
    version = register_run(config, RunDirectory(run_dir), champion)
    get_run_logger().info("Registered %s as version %s.", config.registry.name, version[:12])
    return version
