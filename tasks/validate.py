"""The task that judges the data set."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DatasetError
from nested_core.pipeline import steps
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import read_json_object
from tasks.artifact_client import ArtifactClient, artifact_key
from tasks.retrying import RUN_RETRY_DELAYS, retried_task

MAX_SHOWN_FINDINGS = 50


@retried_task("validate", "validate {config.data}", RUN_RETRY_DELAYS)
def validate(config: FineTuneConfig, run_dir: Path) -> Path:
    """Judge the data set and write dataset.json; DatasetError where it has an error."""
    run = RunDirectory(run_dir)
    try:
        report = steps.validate(config, run)
    except DatasetError:
        _publish_findings(config, run)
        raise
    _publish_findings(config, run)
    count = len(report.warnings)
    noun = "warning" if count == 1 else "warnings"
    get_run_logger().info("The data set passed with %d %s.", count, noun)
    return run.dataset


def _publish_findings(config: FineTuneConfig, run: RunDirectory) -> None:
    """A table of the findings, whether the data set passed or not."""
    report = read_json_object(run.dataset)
    counts = ", ".join(f"{count} {severity}" for severity, count in report["counts"].items())
    with ArtifactClient() as artifacts:
        artifacts.publish_table(
            artifact_key(config.registry.name, "dataset-report"),
            report["findings"][:MAX_SHOWN_FINDINGS],
            f"{counts} in {config.data}. The first {MAX_SHOWN_FINDINGS} findings, errors first.",
        )
