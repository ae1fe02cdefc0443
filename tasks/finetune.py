"""The steps of a run as tasks: validate, load, train, gate and register.

Each is tried again on an I/O error that may pass, but for the gate, which is never tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DatasetError, GateRejected
from nested_core.models.session import Session
from nested_core.pipeline import steps
from nested_core.pipeline.continual import describe_starting_adapter
from nested_core.pipeline.publishing import find_judged_run, register_run
from nested_core.records.dataset import read_dataset_record
from nested_core.records.result import TrainResult
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import read_verdict
from nested_core.records.verdict_table import check_tables, describe_verdict, tier_table
from nested_core.registry import Decision
from nested_core.registry.promotion_policy import registry_location
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest
from nested_core.text.document import Document
from nested_core.text.value_format import format_count
from nested_core.training.trainer import Trainer
from tasks.artifact_client import ArtifactClient, artifact_key, publish_page
from tasks.events import emit_adapter_event
from tasks.promote import announce_promotion, read_origin
from tasks.retrying import (
    REGISTRY_RETRY_DELAYS,
    RUN_RETRY_DELAYS,
    retried_task,
    retry_on_transient_or_memory_error,
)
from tasks.training_progress import PrefectProgress

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
    warnings = format_count(len(report.warnings), "warning")
    get_run_logger().info("The data set passed with %s.", warnings)
    for sentence in steps.describe_earlier_examples(config, run):
        get_run_logger().info("%s", sentence)
    return run.dataset


def _publish_findings(config: FineTuneConfig, run: RunDirectory) -> None:
    """A table of the findings, whether the data set passed or not."""
    report = read_dataset_record(run.dataset)
    counts = ", ".join(f"{count} {severity}" for severity, count in report.counts.items())
    with ArtifactClient() as artifacts:
        artifacts.publish_table(
            artifact_key(config.registry.name, "dataset-report"),
            [finding.to_json() for finding in report.findings[:MAX_SHOWN_FINDINGS]],
            f"{counts} in {config.data}. The first {MAX_SHOWN_FINDINGS} findings, errors first.",
        )


@retried_task("load", "load {config.model}", RUN_RETRY_DELAYS)
def load(config: FineTuneConfig, run_dir: Path, session: Session | None = None) -> Path:
    """Write initial/ and tiers.json; return the initial adapter's directory."""
    run = RunDirectory(run_dir)
    steps.write_initial_adapter_and_tiers(config, run, get_run_logger().info, session=session)
    get_run_logger().info("The initial adapter is in %s.", run.initial)
    if note := describe_starting_adapter(config, run):
        get_run_logger().info("%s", note)
    return run.initial


@retried_task(
    "train",
    "train {config.length_and_tiers}",
    delays=(5, 30),
    condition=retry_on_transient_or_memory_error,
)
def train(
    config: FineTuneConfig,
    run_dir: Path,
    session: Session | None = None,
    watch: Callable[[Trainer], None] | None = None,
) -> TrainResult:
    """Train from initial/, or from the last checkpoint; write adapter/ and result.json.

    `watch` is handed the trainer before its first step, so that a signal can stop it.
    """
    run = RunDirectory(run_dir)
    progress = PrefectProgress(config, run)

    def begin(trainer: Trainer) -> None:
        """Say what it will need, and hand the trainer on."""
        level = logging.INFO if trainer.memory.fits else logging.WARNING
        get_run_logger().log(level, trainer.memory.describe())
        progress.start()
        if watch is not None:
            watch(trainer)

    try:
        result = steps.train(config, run, None, begin, get_run_logger().info, session=session)
    finally:
        progress.finish()
    for flag in result.red_flags:
        get_run_logger().warning("red flag: %s", flag)
    return result


@task(name="gate", task_run_name="gate {run_dir.name}", retries=0, cache_policy=NO_CACHE)
def gate(config: FineTuneConfig, run_dir: Path, session: Session | None = None) -> Path:
    """Judge adapter/ against initial/ and write gate.json; GateRejected where it did not pass."""
    run = RunDirectory(run_dir)
    try:
        verdict = steps.judge(config, run, get_run_logger().info, session=session)
    except GateRejected:
        _publish_verdict(config, read_verdict(run.gate))
        raise
    _publish_verdict(config, verdict)
    get_run_logger().info("The gate: %s", verdict.summary())
    return run.gate


def _publish_verdict(config: FineTuneConfig, verdict: Verdict) -> None:
    """The verdict as a page of its own: why, the losses, the suites and the tiers."""
    said = f"{verdict.outcome}: {verdict.describe()}" if verdict.has_passed else verdict.outcome
    checks = [*check_tables(verdict), tier_table(verdict)]
    page = Document(verdict.outcome, [*describe_verdict(verdict, said), *checks])
    line = f"{said}. The gate's verdict, with tiers"
    publish_page(config.registry.name, "gate-verdict", page, line)


@retried_task("register", "register {config.registry.name}", REGISTRY_RETRY_DELAYS)
def register(config: FineTuneConfig, run_dir: Path, session: Session) -> Decision:
    """Register the run's adapter and promote it, or say why not; again it is the same."""
    run = RunDirectory(run_dir)
    registry, name = registry_location(config.registry)
    judged = find_judged_run(run, session)
    verified = datetime.now(UTC)  # before the promotion, whose event has the time of its line
    decision = register_run(config, judged, judged.verdict.rival, origin=read_origin())
    if not decision.is_registered:
        get_run_logger().info("%s: %s", name, decision.sentence)
        return decision
    get_run_logger().info("Registered %s as version %s.", name, shorten_digest(decision.version))
    payload = {"version": decision.version, "run_dir": str(run.path.resolve())}
    emit_adapter_event("verified", name, payload | {"registry": str(registry.resolve())}, verified)
    return announce_promotion(registry, name, decision)
