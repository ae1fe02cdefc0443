"""Writes the figures of a night for Prometheus, where the worker's environment names a folder."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from prefect import get_run_logger
from prefect.context import FlowRunContext

from nested_core.config.sections import RegistrySection
from nested_core.errors import NestedTuneError
from nested_core.storage.run_directory import DEFAULT_RUNS_FOLDER, RunDirectory

METRICS_FOLDER_VARIABLE = "NESTED_TUNE_METRICS_FOLDER"


def write_metrics(section: RegistrySection, run: RunDirectory, outcome: str) -> None:
    """Write them for the flow run at work; a night does not fail where that fails.

    outcome: the name of its state. Nothing is written without a folder, or without a name in a
    registry.
    """
    folder, context = os.environ.get(METRICS_FOLDER_VARIABLE), FlowRunContext.get()
    if not folder or context is None or section.path is None or section.name is None:
        return
    from nested_core.records.run_status import AdapterRuns, Run, list_runs
    from nested_core.rooms.nights.night_metrics import EndedNight, write_night_metrics

    seconds = (datetime.now(UTC) - context.start_time).total_seconds()
    adapter = AdapterRuns.of(Path(section.path), section.name)
    night = EndedNight(outcome, seconds, Run(run, has_ended=True))
    runs = list_runs(DEFAULT_RUNS_FOLDER) if DEFAULT_RUNS_FOLDER.is_dir() else []
    try:
        write_night_metrics(Path(folder), adapter, runs, night)
    except (NestedTuneError, OSError) as error:
        get_run_logger().warning("The metrics of this night were not written: %s", error)
