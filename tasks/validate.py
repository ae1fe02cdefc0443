"""The task that judges the data set."""

from __future__ import annotations

import json
from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from nested_core import pipeline
from nested_core.config import FineTuneConfig
from nested_core.run_directory import RunDirectory
from tasks.retrying import retry_on_passing_error

SHOWN_FINDINGS = 50


@task(
    name="validate",
    task_run_name="validate {config.data}",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=retry_on_passing_error,
    cache_policy=NO_CACHE,
)
def validate(config: FineTuneConfig, run_dir: Path) -> Path:
    """Judge the data set and write dataset.json; DatasetError where it has an error."""
    run = RunDirectory(run_dir)
    try:
        report = pipeline.validate(config, run)
    finally:
        _show_findings(run)
    get_run_logger().info("The data set passed with %d warnings.", len(report.warnings))
    return run.dataset


def _show_findings(run: RunDirectory) -> None:
    """A table artifact of the findings, whether the data set passed or not."""
    if run.dataset.exists():
        report = json.loads(run.dataset.read_bytes())
        counts = ", ".join(f"{count} {severity}" for severity, count in report["counts"].items())
        create_table_artifact(
            key="dataset-report",
            table=report["findings"][:SHOWN_FINDINGS],
            description=f"Findings: {counts}. The first {SHOWN_FINDINGS} are shown, errors first.",
        )
