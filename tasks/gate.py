"""The task that lets an adapter through or not; it is never tried again."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import GateRejected
from nested_core.gate.verdict import Verdict, read_verdict
from nested_core.pipeline import steps
from nested_core.report.verdict_page import describe_verdict
from nested_core.storage.run_directory import RunDirectory
from tasks.artifact_client import publish_page


@task(name="gate", task_run_name="gate {run_dir.name}", retries=0, cache_policy=NO_CACHE)
def gate(config: FineTuneConfig, run_dir: Path) -> Path:
    """Judge adapter/ against initial/ and write gate.json; GateRejected where it did not pass."""
    run = RunDirectory(run_dir)
    try:
        verdict = steps.judge(config, run, on_wait=get_run_logger().info)
    except GateRejected:
        _publish_verdict(config, read_verdict(run.gate))
        raise
    _publish_verdict(config, verdict)
    get_run_logger().info("The gate: %s", verdict.summary())
    return run.gate


def _publish_verdict(config: FineTuneConfig, verdict: Verdict) -> None:
    """The verdict as a page of its own: why, the losses, the suites and the tiers."""
    codes = ", ".join(reason.code for reason in verdict.reasons)
    word = f"failed: {codes}" if codes else "passed"
    page = describe_verdict(verdict)
    publish_page(
        config.registry.name, "gate-verdict", page, f"{word}. The gate's verdict, with tiers"
    )
