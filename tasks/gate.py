"""The task that lets an adapter through or not; it is never tried again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import GateRejected
from nested_core.pipeline import steps
from nested_core.storage.run_directory import RunDirectory


@task(name="gate", task_run_name="gate {run_dir.name}", retries=0, cache_policy=NO_CACHE)
def gate(config: FineTuneConfig, run_dir: Path) -> Path:
    """Judge adapter/ against initial/ and write gate.json; GateRejected where it did not pass."""
    run = RunDirectory(run_dir)
    try:
        verdict = steps.judge(config, run, on_wait=get_run_logger().info)
    except GateRejected:
        _show(json.loads(run.gate.read_bytes()))
        raise
    _show(verdict.to_json())
    get_run_logger().info("The gate: %s", verdict.summary())
    return run.gate


def _show(verdict: dict[str, Any]) -> None:
    """The verdict as a markdown artifact, the tiers as a table."""
    create_markdown_artifact(key="gate-verdict", markdown=describe_verdict(verdict))
    create_table_artifact(key="tier-table", table=verdict["tiers"])


def describe_verdict(verdict: dict[str, Any]) -> str:
    """A page of markdown: the verdict, why, the losses, and what became of each tier."""
    tensors = verdict["tensors"]
    changed = sum(tensor["changed"] for tensor in tensors)
    lines = [f"# {verdict['verdict']}", ""]
    lines += [f"- `{reason['code']}`: {reason['message']}" for reason in verdict["reasons"]]
    step = f"Adapter of step {verdict['adapter_step']}"
    lines += ["", f"{step}: {changed} of {len(tensors)} tensors changed."]
    if verdict["validation"]:
        before, after = (verdict["validation"][key] for key in ("loss_before", "loss_after"))
        lines += ["", f"Loss {_rounded(before)} before, {_rounded(after)} after."]
    lines += ["", *_TIER_HEADER]
    for tier in verdict["tiers"]:
        lines.append("| " + " | ".join(str(tier[key]) for key in _TIER_KEYS) + " |")
    return "\n".join(lines)


_TIER_KEYS = ("tier", "frequency", "tensors", "changed", "expected_updates", "applied_updates")
_TIER_HEADER = [
    "| tier | updated every | tensors | changed | expected updates | applied |",
    "|---|---|---|---|---|---|",
]


def _rounded(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4g}"
