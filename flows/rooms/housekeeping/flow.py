"""The flow that removes what an adapter no longer needs: old runs, checkpoints, versions."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.states import Completed, Failed, State
from pydantic import Field

from flows.flow_runs.allowed_folders import require_allowed
from flows.flow_runs.prefect_logs import prepare_logs
from flows.promote import AdapterParameters
from nested_core.errors import DamagedError
from nested_core.records.outcome_names import Outcome
from nested_core.records.run_status import list_runs
from nested_core.rooms.housekeeping.run_removal import KeptAmounts
from nested_core.storage.run_directory import DEFAULT_RUNS_FOLDER

KEPT = KeptAmounts()


class HousekeepingParameters(AdapterParameters):
    """Which adapter, and how much of it stays in any case."""

    keep_runs: int = Field(default=KEPT.runs, ge=0, description="its newest runs stay whole")
    keep_days: float = Field(default=KEPT.days, ge=0, description="so do runs of the last days")
    keep_versions: int = Field(
        default=KEPT.versions, ge=0, description="its versions that were used last stay"
    )
    dry_run: bool = Field(default=False, description="only say what would be removed")


@flow(name="housekeeping", retries=0, flow_run_name="housekeeping {config.name}")
def housekeeping(config: HousekeepingParameters) -> State[Any]:
    """Remove what nothing needs; the message has the bytes before and after."""
    from nested_core.rooms.housekeeping.housekeeping import (
        tidy_up,  # loads the libraries that answer
    )

    prepare_logs()
    registry = require_allowed(config.registry, "registry")
    kept = KeptAmounts(config.keep_runs, config.keep_days, config.keep_versions)
    runs = list_runs(DEFAULT_RUNS_FOLDER) if DEFAULT_RUNS_FOLDER.is_dir() else None
    try:
        done = tidy_up(registry, config.name, runs, kept, dry_run=config.dry_run)
    except DamagedError as error:
        return Failed(name=Outcome.DAMAGED, message=error.describe_for("page"), data=error)
    return Completed(message=done.describe())
