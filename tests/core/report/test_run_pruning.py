"""Old run folders go, and none that a version, a judgement or a process names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nested_core import registry as core
from nested_core.errors import ConfigError, DamagedError
from nested_core.records.dataset import Finding
from nested_core.records.run import list_runs
from nested_core.records.verdict import Reason
from nested_core.report.outcome import list_row
from nested_core.report.pruning import prune_runs
from nested_core.storage.run_directory import RunDirectory
from tests.core.registry.conftest import write_run
from tests.runs import begin_run, finished_run

NAME = "support-bot"


def make_run(folder: Path, day: int, **changes: Any) -> RunDirectory:
    section = {"path": str(folder / "registry"), "name": NAME}
    name = f"202611{day:02}T020000Z-0000000{day % 10}"
    return finished_run(folder / "runs" / name, registry=section, **changes)


def register_for(run: RunDirectory, folder: Path, seed: int) -> str:
    """A version whose provenance names a run."""
    written = write_run(folder / f"written-{seed}", seed)
    recorded = {"run_dir": str(run.path.resolve()), "config": {}}
    return core.register(written, folder / "registry", NAME, recorded)


def test_old_runs_go_and_what_a_version_names_stays(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, day) for day in (1, 2, 3, 4)]
    version = register_for(runs[1], tmp_path, 1)
    for is_dry_run in (True, False):
        done = prune_runs(tmp_path / "runs", keep=1, dry_run=is_dry_run)
        assert done.removed == (str(runs[2].path), str(runs[0].path))
        assert done.kept == {str(runs[1].path): f"version {version[:12]} of {NAME} names it"}
        assert done.bytes > 1000
        assert runs[0].path.exists() is is_dry_run
    assert [run.path.exists() for run in runs] == [False, True, False, True]


def test_a_run_at_work_a_damaged_one_and_one_whose_registry_is_away_stay(tmp_path: Path) -> None:
    at_work, damaged, away = (make_run(tmp_path, day) for day in (1, 2, 3))
    (tmp_path / "registry" / NAME / "versions").mkdir(parents=True)
    damaged.gate.write_text("{")
    text = away.config.read_text()
    away.config.write_text(text.replace(str(tmp_path / "registry"), "elsewhere"))
    with at_work.locked():
        done = prune_runs(tmp_path / "runs", keep=0)
    assert done.removed == ()
    assert done.kept == {
        str(at_work.path): "a process works on it",
        str(damaged.path): "damaged",
        str(away.path): "its registry elsewhere is not found from this folder",
    }


def test_a_registry_that_cannot_be_read_keeps_every_run(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, day) for day in (1, 2)]
    version = register_for(runs[0], tmp_path, 1)
    provenance = tmp_path / "registry" / NAME / "versions" / version / "provenance.json"
    provenance.chmod(0o600)
    provenance.write_text("{")
    with pytest.raises(DamagedError, match="provenance"):
        prune_runs(tmp_path / "runs", keep=0)
    assert all(run.path.exists() for run in runs)


def test_a_negative_number_of_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--keep -1"):
        prune_runs(tmp_path, keep=-1)


def test_the_list_says_the_adapter_the_outcome_and_the_minutes(tmp_path: Path) -> None:
    rejected = make_run(tmp_path, 2, reasons=[Reason("loss_regressed", "worse")])
    kept = make_run(tmp_path, 3, text="of another adapter")
    bad = [Finding("train.jsonl", 7, "error", "bad-json", "column 46")]
    refused = begin_run(tmp_path / "runs" / "20261104T020000Z-00000004", findings=bad)
    register_for(rejected, tmp_path, 1)
    rows = {run.name: list_row(run) for run in list_runs(tmp_path / "runs")}
    assert rows[rejected.path.name][2] == "Rejected: worse"
    assert rows[refused.path.name][2] == "Failed: data"
    _, adapter, outcome, *_, minutes = rows[kept.path.name]
    assert (adapter, outcome, minutes) == (NAME, "Kept the champion: passed, better", "0.0")
