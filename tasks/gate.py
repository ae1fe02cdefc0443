"""The task that lets an adapter through or not; it is never tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import GateRejected
from nested_core.pipeline import steps
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import read_json_object
from tasks.artifacts import MarkdownPage, publish_page, publish_table


@task(name="gate", task_run_name="gate {run_dir.name}", retries=0, cache_policy=NO_CACHE)
def gate(config: FineTuneConfig, run_dir: Path) -> Path:
    """Judge adapter/ against initial/ and write gate.json; GateRejected where it did not pass."""
    run = RunDirectory(run_dir)
    try:
        verdict = steps.judge(config, run, on_wait=get_run_logger().info)
    except GateRejected:
        _create_verdict_artifacts(read_json_object(run.gate))
        raise
    _create_verdict_artifacts(verdict.to_json())
    get_run_logger().info("The gate: %s", verdict.summary())
    return run.gate


def _create_verdict_artifacts(verdict: dict[str, Any]) -> None:
    """The verdict as a markdown artifact, the tiers as a table."""
    publish_page("gate-verdict", describe_verdict(verdict))
    publish_table("tier-table", verdict["tiers"])


def describe_verdict(verdict: dict[str, Any]) -> MarkdownPage:
    """A page of markdown: the verdict, why, the losses, and what became of each tier."""
    tensors = verdict["tensors"]
    changed = sum(tensor["changed"] for tensor in tensors)
    page = MarkdownPage(verdict["verdict"])
    page.add_points((reason["code"], reason["message"]) for reason in verdict["reasons"])
    step = f"Adapter of step {verdict['adapter_step']}"
    page.add_paragraph(f"{step}: {changed} of {len(tensors)} tensors changed.")
    if verdict["validation"]:
        before, after = (verdict["validation"][key] for key in ("loss_before", "loss_after"))
        examples = f"{verdict['validation']['file']}, {verdict['validation']['examples']} examples"
        losses = f"{_round(before)} before, {_round(after)} after"
        page.add_paragraph(f"Loss {losses} ({examples}).")
    if verdict["champion"]:
        page.add_paragraph(_describe_champion(verdict["champion"]))
    if verdict["tasks"]:
        page.add_table(TASK_COLUMNS, map(_task_row, verdict["tasks"]))
    page.add_table(TIER_COLUMNS, ([tier[key] for key in TIER_KEYS] for tier in verdict["tiers"]))
    return page


TASK_COLUMNS = (
    "suite",
    "questions",
    "base",
    "parent",
    "champion",
    "candidate",
    "change",
    "95 %",
    "verdict",
)
TIER_KEYS = ("tier", "frequency", "tensors", "changed", "expected_updates", "applied_updates")
TIER_COLUMNS = ("tier", "updated every", "tensors", "changed", "expected updates", "applied")


def _round(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _task_row(task: dict[str, Any]) -> list[str]:
    interval = task["interval"]
    return [
        task["name"],
        str(task["questions"]),
        *(_round(task[model]) for model in ("base", "parent", "champion", "candidate")),
        f"{task['difference']:+.3f}",
        "none" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}",
        task["verdict"],
    ]


def _describe_champion(champion: dict[str, Any]) -> str:
    """The champion's loss on the same examples, or why there is none."""
    version = champion["version"][:12]
    if champion["not_compared"] is not None:
        return f"Champion {version}: not compared; {champion['not_compared']}."
    interval = ""
    if champion["interval"] is not None:
        low, high = champion["interval"]
        interval = f", 95 % interval {low:+.4g} to {high:+.4g}"
    return (
        f"Champion {version}: loss {_round(champion['loss'])} on the same examples; "
        f"difference {champion['difference']:+.4g}{interval}."
    )
