"""The task that makes the initial adapter, or takes it from a file."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from nested_core.config.schema import FineTuneConfig
from nested_core.pipeline import steps
from nested_core.pipeline.continual import describe_starting_adapter
from nested_core.storage.run_directory import RunDirectory
from tasks.retrying import RUN_RETRY_DELAYS, retried_task


@retried_task("load", "load {config.model}", RUN_RETRY_DELAYS)
def load(config: FineTuneConfig, run_dir: Path) -> Path:
    """Write initial/ and tiers.json; return the initial adapter's directory."""
    run = RunDirectory(run_dir)
    steps.write_initial_adapter_and_tiers(config, run, on_wait=get_run_logger().info)
    get_run_logger().info("The initial adapter is in %s.", run.initial)
    if note := describe_starting_adapter(config, run):
        get_run_logger().info("%s", note)
    return run.initial
