"""What `doctor` says of a registry: how much its housekeeping would remove."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flows.commands.check import Check, DoctorChecks
from nested_core.errors import NestedTuneError


def iterate_housekeeping_checks(registry: Path) -> Iterator[Check]:
    """For each name of the registry, how much its weekly housekeeping would remove now."""
    if not registry.is_dir():
        return
    from nested_core.records.run_status import list_runs
    from nested_core.registry import list_names
    from nested_core.rooms.housekeeping.housekeeping import tidy_up
    from nested_core.rooms.housekeeping.run_removal import KeptAmounts
    from nested_core.storage.run_directory import DEFAULT_RUNS_FOLDER

    runs = list_runs(DEFAULT_RUNS_FOLDER) if DEFAULT_RUNS_FOLDER.is_dir() else None
    for name in list_names(registry):
        try:
            plan = tidy_up(registry, name, runs, KeptAmounts(), dry_run=True)
        except (NestedTuneError, OSError) as error:
            yield Check(f"housekeeping {name}", False, str(error), "nested-tune audit")
        else:
            yield Check(f"housekeeping {name}", True, plan.describe())


CHECKS = DoctorChecks(of_registry=iterate_housekeeping_checks)
