"""The task that compares the runs of a sweep: a table of all, and the best that was verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from prefect import task
from prefect.cache_policies import NO_CACHE

from nested_core.config.registry import RegistrySection
from nested_core.errors import DamagedError
from nested_core.registry import list_versions
from nested_core.registry.promotion_policy import registry_location
from nested_core.storage.adapter import read_adapter
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import read_json_object
from nested_core.text.loss_format import format_loss
from tasks.artifact_client import ArtifactClient


@dataclass(frozen=True)
class SweepRunResult:
    """What one run of a sweep came to; the loss is the gate's, None without a validation set."""

    run_dir: str
    point: dict[str, Any]
    state: str
    message: str
    has_passed: bool
    loss: float | None

    @classmethod
    def read_from_run(
        cls,
        run: RunDirectory,
        point: dict[str, Any],
        state: str,
        message: str,
        *,
        is_candidate: bool = False,
    ) -> Self:
        """Read the verdict from the run directory; without one the run did not pass.

        `state` is the name of the run's state, which is its outcome; `is_candidate` says that the
        run completed and registered what the gate passed.
        """
        verdict = read_json_object(run.gate) if run.gate.exists() else {}
        has_passed = verdict.get("verdict") == "passed" and is_candidate
        loss = (verdict.get("validation") or {}).get("loss_after")
        return cls(str(run.path), point, state, message, has_passed, loss)

    def describe(self) -> str:
        """The settings of this run and its loss."""
        settings = ", ".join(f"{key}={value}" for key, value in self.point.items())
        return (
            f"{settings} (val loss {format_loss(self.loss)})" if self.loss is not None else settings
        )


@task(name="collect", task_run_name="collect the sweep's results", cache_policy=NO_CACHE)
def pick_best_run(outcomes: Sequence[SweepRunResult]) -> SweepRunResult | None:
    """Show all as a table; return the verified run of the lowest validation loss, or None."""
    rows = [
        outcome.point
        | {"state": outcome.state, "val_loss": outcome.loss, "result": outcome.message}
        for outcome in outcomes
    ]
    description = f"{len(rows)} runs of the sweep: settings, outcome and validation loss"
    with ArtifactClient() as artifacts:
        artifacts.publish_table("sweep-results", rows, description)
    verified = [outcome for outcome in outcomes if outcome.has_passed]
    return min(verified, key=lambda o: float("inf") if o.loss is None else o.loss, default=None)


def find_registered_version(section: RegistrySection, outcome: SweepRunResult) -> str:
    """The version that a run registered: its adapter's digest."""
    registry, name = registry_location(section)
    version = read_adapter(RunDirectory(Path(outcome.run_dir)).adapter).digest()
    if version not in list_versions(registry, name):
        raise DamagedError(f"{outcome.run_dir} passed the gate, and is not in {registry / name}.")
    return version
