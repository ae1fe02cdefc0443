"""The file of a night's figures for node_exporter's textfile collector."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from nested_core.records.run_status import AdapterRuns, Run, list_runs
from nested_core.registry import register_and_promote
from nested_core.rooms.nights.night_metrics import EndedNight, write_night_metrics
from nested_core.storage.folder_size import size_on_disk
from tests.core.registry.conftest import write_run
from tests.runs import begin_run, finished_run

NAME = "support-bot"


def figures(folder: Path) -> dict[tuple[str, ...], float]:
    """Each sample by its metric, and its labels but the adapter's name."""
    (file,) = folder.iterdir()
    assert file.name == f"nested_tune_{NAME}.prom"
    return {
        (
            sample.name.removeprefix("nested_tune_"),
            *(value for key, value in sample.labels.items() if key != "name"),
        ): sample.value
        for family in text_string_to_metric_families(file.read_text())
        for sample in family.samples
    }


def test_a_night_has_outcome_loss_seconds_the_champions_time_and_bytes_for_everybody_to_read(
    tmp_path: Path,
) -> None:
    registry, runs, folder = (tmp_path / name for name in ("registry", "runs", "metrics"))
    folder.mkdir()
    run = finished_run(runs / "one", registry={"path": str(registry), "name": NAME})
    finished_run(runs / "two", registry={"path": str(registry), "name": "another"})
    before = datetime.now(UTC).timestamp()
    written = write_run(tmp_path / "written", 1)
    version = register_and_promote(written, registry, NAME, {}, by="a night").version
    umask = os.umask(0o077)
    try:
        night = EndedNight("Promoted", 12.5, Run(run))
        write_night_metrics(folder, AdapterRuns.of(registry, NAME), list_runs(runs), night)
    finally:
        os.umask(umask)
    assert next(folder.iterdir()).stat().st_mode & 0o777 == 0o644
    found = figures(folder)
    assert found["night_outcome", "Promoted"] == 1.0
    assert found["night_seconds",] == 12.5
    assert found["night_loss",] == Run(run).gate_loss
    assert found["champion_info", version] == 1.0
    assert found["runs_bytes",] == size_on_disk(run.path)
    assert found["registry_bytes",] == size_on_disk(registry / NAME)
    for time in ("night_end_timestamp_seconds", "champion_timestamp_seconds"):
        assert int(before) <= found[time,] <= datetime.now(UTC).timestamp()


def test_a_first_night_that_ended_before_its_gate_has_no_loss_and_no_champion(tmp_path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    run = begin_run(tmp_path / "one", registry={"path": str(tmp_path / "none"), "name": NAME})
    adapter = AdapterRuns.of(tmp_path / "none", NAME)
    for outcome in ("Failed: data", "Failed"):  # the second night's file replaces the first's
        write_night_metrics(
            folder, adapter, list_runs(tmp_path), EndedNight(outcome, 1.0, Run(run))
        )
    found = figures(folder)
    assert found["night_outcome", "Failed"] == 1.0
    assert found["runs_bytes",] == size_on_disk(run.path)
    assert {metric for metric, *_ in found} == {
        "night_outcome",
        "night_end_timestamp_seconds",
        "night_seconds",
        "runs_bytes",
        "registry_bytes",
    }
