"""The task that lets an adapter through or not; it is never tried again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import GateRejected
from nested_core.gate.verdict import SampleVerdict, TaskResult
from nested_core.pipeline import steps
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import read_json_object
from tasks.artifact_client import ArtifactClient, artifact_key
from tasks.markdown_page import MarkdownPage
from tasks.verdict_text import describe_champion_loss, describe_drift, describe_losses


@task(name="gate", task_run_name="gate {run_dir.name}", retries=0, cache_policy=NO_CACHE)
def gate(config: FineTuneConfig, run_dir: Path) -> Path:
    """Judge adapter/ against initial/ and write gate.json; GateRejected where it did not pass."""
    run = RunDirectory(run_dir)
    try:
        verdict = steps.judge(config, run, on_wait=get_run_logger().info)
    except GateRejected:
        _publish_verdict(config, read_json_object(run.gate))
        raise
    _publish_verdict(config, verdict.to_json())
    get_run_logger().info("The gate: %s", verdict.summary())
    return run.gate


def _publish_verdict(config: FineTuneConfig, verdict: dict[str, Any]) -> None:
    """The verdict as a page of its own: why, the losses, the suites and the tiers."""
    codes = ", ".join(reason["code"] for reason in verdict["reasons"])
    description = (
        verdict["verdict"] + (f": {codes}" if codes else "") + ". The gate's verdict, with tiers"
    )
    key = artifact_key(config.registry.name, "gate-verdict")
    with ArtifactClient() as artifacts:
        artifacts.publish_page(key, describe_verdict(verdict), description)


def describe_verdict(verdict: dict[str, Any]) -> MarkdownPage:
    """A page of markdown: the verdict, why, the losses, and what became of each tier."""
    tensors = verdict["tensors"]
    changed = sum(tensor["changed"] for tensor in tensors)
    page = MarkdownPage(verdict["verdict"])
    page.add_bullets((reason["code"], reason["message"]) for reason in verdict["reasons"])
    step = f"Adapter of step {verdict['adapter_step']}"
    page.add_paragraph(f"{step}: {changed} of {len(tensors)} tensors changed.")
    if verdict["validation"]:
        page.add_paragraph(f"Loss {describe_losses(verdict)}.")
    elif verdict["verdict"] == "passed":
        page.add_paragraph("Changed and sound; held-out loss not measured.")
    for note in _list_notes(verdict):
        page.add_paragraph(f"{note}.")
    if verdict["drift"]:
        page.add_paragraph(f"{describe_drift(verdict['drift'])}.")
    if verdict["champion"]:
        page.add_paragraph(describe_champion_loss(verdict["champion"]))
    if verdict["tasks"]:
        page.add_table(SUITE_TABLE_COLUMNS, map(_format_suite_row, verdict["tasks"]))
    page.add_table(
        TIER_TABLE_COLUMNS, ([tier[key] for key in TIER_TABLE_KEYS] for tier in verdict["tiers"])
    )
    return page


def _list_notes(verdict: dict[str, Any]) -> Iterator[str]:
    """What a passing verdict still has to say: broken answers, and what a passing suite lost."""
    samples = verdict.get("samples")
    if samples is not None and (judged := SampleVerdict(**samples)).are_broken:
        yield judged.describe()
    for suite in verdict["tasks"]:
        note = TaskResult(**suite).describe_lost() if suite.get("lost") else None
        if note is not None:
            yield note


COMPARED_MODELS = ("base", "parent", "champion", "candidate")
SUITE_TABLE_COLUMNS = ("suite", "questions", *COMPARED_MODELS, "change", "95 %", "verdict")
TIER_TABLE_KEYS = ("tier", "frequency", "tensors", "changed", "expected_updates", "applied_updates")
TIER_TABLE_COLUMNS = ("tier", "updated every", "tensors", "changed", "expected updates", "applied")


def _format_figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _format_suite_row(task: dict[str, Any]) -> list[str]:
    interval = task["interval"]
    return [
        task["name"],
        str(task["questions"]),
        *(_format_figure(task[model]) for model in COMPARED_MODELS),
        f"{task['difference']:+.3f}",
        "none" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}",
        task["verdict"],
    ]
