"""What became of a run, in a word, from its folder and the registry that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import NestedTuneError
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import read_json_object


def describe_outcome(run: RunDirectory, config: FineTuneConfig, status: dict[str, Any]) -> str:
    """`promoted`, `rejected: loss_regressed`, `failed: data`, or the state of a run under way.

    `status` is what `read_status` says of the run. What a registry says counts where it is there.
    """
    if status["state"] == "running":
        return "running"
    if status["verdict"] == "failed":
        return f"rejected: {status['reasons'][0]}"
    if status["verdict"] == "passed":
        return _describe_publication(run, config)
    if status["state"] != "never began" or not run.dataset.exists():
        return str(status["state"])
    if read_json_object(run.dataset).get("counts", {}).get("error"):
        return "failed: data"
    is_continual = config.continual.start is not None and config.continual.skip_unchanged
    return "skipped" if is_continual else "never began"


def measure_minutes(run: RunDirectory) -> float | None:
    """From the run's configuration to the last that training or gate wrote; None before that."""
    written = [run.gate, run.result, run.metrics, run.dataset]
    try:
        begun = run.config.stat().st_mtime
        ended = max((path.stat().st_mtime for path in written if path.exists()), default=begun)
    except OSError:
        return None
    return max(0.0, ended - begun) / 60


def _describe_publication(run: RunDirectory, config: FineTuneConfig) -> str:
    """What the registry says of the version that a run made; "verified" without a registry."""
    from nested_core.records.verdict_file import read_verdict
    from nested_core.registry import history, list_versions  # brings mlx
    from nested_core.registry.name_folders import name_exists

    section = config.registry
    if section.path is None or section.name is None:
        return "verified"
    registry, name = Path(section.path), section.name
    try:
        if not name_exists(registry, name):
            return "verified"
        version = read_verdict(run.gate).trained.digest
        actions = [line["action"] for line in history(registry, name) if line["version"] == version]
        is_registered = version in list_versions(registry, name)
    except (NestedTuneError, OSError):  # `audit` says what is wrong with a registry
        return "verified"
    if "promote" in actions:
        return "promoted"
    if "declined" in actions:
        return "declined"
    return "verified" if is_registered or actions else "kept the champion"
