"""Housekeeping of one adapter: what goes, what stays for a version, bytes before and after."""

from __future__ import annotations

import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nested_core import registry as core
from nested_core.errors import DamagedError
from nested_core.records.run_status import list_runs
from nested_core.rooms.housekeeping.housekeeping import tidy_up
from nested_core.rooms.housekeeping.registry_audit import audit
from nested_core.rooms.housekeeping.removal import size_on_disk
from nested_core.rooms.housekeeping.run_removal import KeptAmounts
from nested_core.storage.run_directory import new_run_name
from nested_core.storage.user_cache import CACHE_VARIABLE
from nested_core.text.value_format import format_bytes
from tests.builders.registering import promote, register
from tests.core.registry.conftest import no_time_to_decide, write_run
from tests.runs import add_checkpoints, finished_run

NAME = "support-bot"
KEPT = KeptAmounts(runs=1, days=0, versions=1)
__all__ = ["no_time_to_decide"]


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_time_to_decide: None) -> list[str]:
    """Six nights, each a run and a champion; the versions, and caches with an old entry each."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    for kind in ("answers", "datasets", "kernels"):
        folder = tmp_path / "cache" / kind
        folder.mkdir(parents=True, mode=0o700)
        for name, age in (("old", 40), ("new", 1)):
            (folder / name).write_bytes(bytes(1000))
            os.utime(folder / name, (0, time.time() - age * 24 * 3600))
    registry = tmp_path / "registry"
    versions = []
    for day in range(1, 7):
        folder = tmp_path / "runs" / f"202611{day:02}T020000Z-0000000{day}"
        written = write_run(tmp_path / f"written-{day}", day)
        version = register(written, registry, NAME, {"config": {}})
        section = {"path": str(registry), "name": NAME}
        finished_run(folder, registry=section, trained=version)
        versions.append(version)
        promote(registry, NAME, versions[-1], by="a night")
    return versions


def runs_in(folder: Path) -> list[Path]:
    """The runs, without the folders of their data."""
    return sorted(path for path in folder.iterdir() if not path.name.endswith("-data"))


def all_files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name not in ("history.jsonl", "run.lock")}


def test_what_goes_is_measured_and_a_dry_run_says_the_same_and_removes_nothing(
    nights: list[str], tmp_path: Path
) -> None:
    registry, runs = tmp_path / "registry", tmp_path / "runs"
    before = all_files(tmp_path)
    planned = tidy_up(registry, NAME, list_runs(runs), KEPT, dry_run=True)
    assert all_files(tmp_path) == before
    done = tidy_up(registry, NAME, list_runs(runs), KEPT)
    # The champion, the one that it replaced, and no other.
    assert core.list_versions(registry, NAME) == sorted(nights[-2:])
    assert len(runs_in(runs)) == 2
    assert not (tmp_path / "cache" / "answers" / "old").exists()
    assert (tmp_path / "cache" / "answers" / "new").exists()
    assert (tmp_path / "cache" / "kernels" / "old").exists()
    assert planned.before == done.before
    assert (planned.cached, len(done.cached)) == (done.cached, 2)
    caches = sum(size_on_disk(tmp_path / "cache" / kind) for kind in ("answers", "datasets"))
    assert done.after == size_on_disk(registry) + caches + sum(map(size_on_disk, runs_in(runs)))
    lines = 4 * 500  # of the history, for versions that were removed
    assert planned.after <= done.after <= planned.after + lines
    assert done.runs is not None
    assert done.describe() == (
        f"{format_bytes(done.before)} before, {format_bytes(done.after)} after; removed: "
        f"4 runs and 0 spare checkpoints of others ({format_bytes(done.runs.bytes)}), 4 versions "
        f"({format_bytes(done.versions.bytes)}), 0 stored examples, "
        "2 cached data sets and answers"
    )
    assert ("would be removed" in planned.describe(), "would" in done.describe()) == (True, False)
    assert audit(registry, NAME).is_sound
    again = tidy_up(registry, NAME, list_runs(runs), KEPT)
    assert (again.after - again.before, again.runs is not None and again.runs.removed) == (0, ())


def test_another_name_that_is_damaged_keeps_every_run(nights: list[str], tmp_path: Path) -> None:
    registry, runs = tmp_path / "registry", tmp_path / "runs"
    shutil.copytree(registry / NAME, registry / "another", symlinks=True)
    # The same digest as a version of this name that goes.
    provenance = registry / "another" / "versions" / nights[0] / "provenance.json"
    provenance.chmod(0o600)
    provenance.write_text("{")
    before = all_files(runs)
    with pytest.raises(DamagedError, match="another"):
        tidy_up(registry, NAME, list_runs(runs), KEPT)
    assert all_files(runs) == before


def test_a_run_that_a_version_of_another_name_names_stays(nights, tmp_path) -> None:
    registry, runs = tmp_path / "registry", tmp_path / "runs"
    first = runs_in(runs)[0]
    register(tmp_path / "written-1", registry, "another", {"config": {}})
    others = all_files(registry / "another")
    done = tidy_up(registry, NAME, list_runs(runs), KEPT)
    assert done.runs is not None
    assert list(done.runs.kept) == [str(runs_in(runs)[1]), str(first)]
    assert all_files(registry / "another") == others


def test_where_there_is_no_folder_of_runs_the_registry_is_tidied(nights, tmp_path) -> None:
    done = tidy_up(tmp_path / "registry", NAME, None, KEPT)
    assert (done.runs, len(done.versions.collected)) == (None, 4)
    assert "no folder of runs here" in done.describe()


@pytest.mark.slow("sixty nights of runs and versions")
def test_with_a_new_champion_every_night_disk_stays_as_it_is_from_the_twentieth_to_the_sixtieth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_time_to_decide: None
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    registry, runs = tmp_path / "registry", tmp_path / "runs"
    sizes = []
    for night in range(1, 61):
        day = datetime.now(UTC) - timedelta(days=60 - night)
        written = write_run(tmp_path / f"w{night}", night)
        version = register(written, registry, NAME, {"config": {}})
        section = {"path": str(registry), "name": NAME}
        folder = runs / new_run_name(day, f"{night:08}")
        run = finished_run(folder, registry=section, trained=version)
        add_checkpoints(run, 2, 4, 6, 8, offered=4)
        promote(registry, NAME, version, by="a night")
        if night % 7 == 0 or night % 20 == 0:
            tidy_up(registry, NAME, list_runs(runs), KeptAmounts())
        if night % 20 == 0:
            versions = size_on_disk(registry / NAME / "versions")
            sizes.append((sum(map(size_on_disk, runs_in(runs))), versions))
    (runs_then, versions_then), *later = sizes
    for runs_now, versions_now in later:
        assert runs_now == pytest.approx(runs_then, rel=0.001)
        assert versions_now == pytest.approx(versions_then, rel=0.01)
    assert len(core.list_versions(registry, NAME)) == 10
    assert len(runs_in(runs)) == 14
    assert (registry / NAME / "history.jsonl").stat().st_size < 60 * 2000
