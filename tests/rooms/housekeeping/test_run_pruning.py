"""Old run folders go, and none that a version, a judgement or a process names."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from nested_core.errors import ConfigError, DamagedError
from nested_core.records.dataset import Finding
from nested_core.records.outcome_names import Outcome
from nested_core.records.promoted_to import add_promoted_to
from nested_core.records.run_status import AdapterRuns, Run, list_runs
from nested_core.records.verdict import Reason
from nested_core.registry.link_and_views import reading
from nested_core.registry.trials import record_trial
from nested_core.report.outcome import list_row
from nested_core.rooms.housekeeping import run_removal
from nested_core.rooms.housekeeping.garbage_collection import collect_garbage
from nested_core.rooms.housekeeping.removal import size_on_disk
from nested_core.rooms.housekeeping.run_removal import PruneReport, prune_runs
from nested_core.storage.checkpoint_verification import checkpoint_path, list_checkpoints
from nested_core.storage.run_directory import RunDirectory
from tests.builders.registering import promote, register
from tests.core.registry.conftest import no_time_to_decide, write_run
from tests.runs import add_checkpoints, begin_run, finished_run

pytestmark = pytest.mark.slow("copies and removes whole runs")

NAME = "support-bot"
__all__ = ["no_time_to_decide"]


REJECTED = [Reason("loss_regressed", "worse")]


def make_run(folder: Path, day: int, name: str = NAME, **changes: Any) -> RunDirectory:
    """A run that nothing needs, as the gate rejected it; `reasons` none makes one that passed."""
    settings = {"registry": {"path": str(folder / "registry"), "name": name}, "reasons": REJECTED}
    folder_name = f"202611{day:02}T020000Z-0000000{day % 10}"
    return finished_run(folder / "runs" / folder_name, **settings | changes)


def make_registered(folder: Path, day: int, **changes: Any) -> tuple[RunDirectory, str]:
    """A run that passed, and its version in the registry."""
    written = write_run(folder / f"written-{day}", day)
    version = register(written, folder / "registry", NAME, {"config": {}})
    return make_run(folder, day, reasons=(), trained=version, **changes), version


def test_old_runs_go_and_what_a_version_names_stays(tmp_path: Path) -> None:
    first, (named, version), third, newest = (
        make_run(tmp_path, 1),
        make_registered(tmp_path, 2),
        make_run(tmp_path, 3),
        make_run(tmp_path, 4),
    )
    for is_dry_run in (True, False):
        done = prune_runs(list_runs(tmp_path / "runs"), keep=1, dry_run=is_dry_run)
        assert done.removed == (str(third.path), str(first.path))
        assert done.kept == {str(named.path): f"version {version[:12]} of {NAME} names it"}
        assert done.bytes > 1000
        assert first.path.exists() is is_dry_run
    exist = [run.path.exists() for run in (first, named, third, newest)]
    assert exist == [False, True, False, True]


def test_a_run_that_a_version_names_keeps_the_checkpoint_that_it_offers_and_its_last(
    tmp_path: Path,
) -> None:
    runs = [make_registered(tmp_path, day)[0] for day in (1, 2, 3, 4)]
    named, at_work, unfinished, newest = runs
    for run in runs:
        add_checkpoints(run, 2, 4, 6, 8, offered=4)
    unfinished.result.unlink()  # it was made longer, and goes on from any of them
    spare = tuple(str(checkpoint_path(named.checkpoints, step)) for step in (2, 6))
    for is_dry_run in (True, False):
        with at_work.locked():
            done = prune_runs(list_runs(tmp_path / "runs"), keep=1, dry_run=is_dry_run)
        assert (done.removed, done.checkpoints, done.bytes) == ((), spare, 20_000)
        assert done.kept[str(at_work.path)] == "a process works on it"
        assert len(list_checkpoints(named.checkpoints)) == (4 if is_dry_run else 2)
    assert done.describe() == "0 runs and 2 spare checkpoints of others (20.0 kB)"
    assert [Path(path).name for path in list_checkpoints(named.checkpoints)] == [
        "step-0000004",
        "step-0000008",
    ]
    for run in (at_work, unfinished, newest):
        assert len(list_checkpoints(run.checkpoints)) == 4


def test_of_one_adapter_its_own_old_runs_go_and_no_run_of_another_name_or_registry(
    tmp_path: Path,
) -> None:
    (tmp_path / "registry" / NAME / "versions").mkdir(parents=True)
    old, fresh = (make_run(tmp_path, day) for day in (1, 2))
    other = make_run(tmp_path, 3, "another")
    elsewhere = make_run(tmp_path, 4)
    text = elsewhere.config.read_text()
    (tmp_path / "second").mkdir()
    elsewhere.config.write_text(text.replace(str(tmp_path / "registry"), str(tmp_path / "second")))
    unreadable = make_run(tmp_path, 5)
    unreadable.config.write_text("{")
    ours = AdapterRuns.of(tmp_path / "registry", NAME)
    age = datetime.now(UTC) - Run(fresh).started + timedelta(hours=1)
    done = prune_runs(list_runs(tmp_path / "runs"), keep=0, adapter=ours, min_age=age)
    assert (done.removed, done.kept) == ((str(old.path),), {})
    done = prune_runs(list_runs(tmp_path / "runs"), keep=0, adapter=ours)
    assert (done.removed, done.kept) == ((str(fresh.path),), {})
    assert all(run.path.exists() for run in (other, elsewhere, unreadable))


class Killed(BaseException):
    """No error that any code handles."""


def test_a_removal_that_is_killed_anywhere_is_finished_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for killed_after in itertools.count():
        folder = tmp_path / str(killed_after)
        run = make_run(folder, 1)
        (folder / "registry" / NAME / "versions").mkdir(parents=True)
        add_checkpoints(run, 8, offered=8)
        calls = itertools.count()
        with monkeypatch.context() as patch, suppress(Killed):
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name), calls, killed_after))
            prune_runs(list_runs(folder / "runs"), keep=0)
            break
        if run.path.exists() and RunDirectory(run.path).has_run_files():
            assert prune_runs(list_runs(folder / "runs"), keep=0).removed == (str(run.path),)
        assert not list(run.path.glob("*/*"))
    assert killed_after > 10
    assert not run.path.exists()


def dying(call: Callable[..., None], calls: Iterator[int], last: int) -> Callable[..., None]:
    """A function of the system that works `last` times, of all that count together."""

    def die(*arguments: Any, **options: Any) -> None:
        if next(calls) == last:
            raise Killed
        call(*arguments, **options)

    return die


def test_a_run_at_work_a_damaged_one_and_one_whose_registry_is_away_stay(tmp_path: Path) -> None:
    at_work, damaged, away = (make_run(tmp_path, day, reasons=()) for day in (1, 2, 3))
    (tmp_path / "registry" / NAME / "versions").mkdir(parents=True)
    damaged.gate.write_text("{")
    text = away.config.read_text()
    away.config.write_text(text.replace(str(tmp_path / "registry"), "elsewhere"))
    with at_work.locked():
        done = prune_runs(list_runs(tmp_path / "runs"), keep=0)
    assert done.removed == ()
    assert done.kept == {
        str(at_work.path): "a process works on it",
        str(damaged.path): "damaged",
        str(away.path): "its registry elsewhere is not found from this folder",
    }


def prune(folder: Path, **options: Any) -> PruneReport:
    return prune_runs(list_runs(folder / "runs"), **{"keep": 0} | options)


def test_a_link_is_neither_followed_nor_counted_and_keeps_the_run_that_it_leads_to(
    tmp_path: Path,
) -> None:
    elsewhere, linked, newest = (make_run(tmp_path, day) for day in (9, 1, 2))
    elsewhere.path.rename(tmp_path / "mine")
    links = [tmp_path / "runs" / name for name in ("shown", "best")]
    links[0].symlink_to("../mine")
    links[1].symlink_to(linked.path)
    before = sorted((tmp_path / "mine").rglob("*"))
    done = prune(tmp_path, keep=1)
    assert (done.removed, sorted((tmp_path / "mine").rglob("*"))) == ((), before)
    assert done.kept == {
        str(linked.path): f"the link {links[1]} leads to it",
        str(links[0]): "it is a link to ../mine, and no link is followed to remove",
        str(links[1]): f"it is a link to {linked.path}, and no link is followed to remove",
    }
    assert newest.path.exists()


@pytest.mark.parametrize(
    "inside",
    [
        "notes.txt",
        "adapter/notes.txt",
        ".DS_Store-notes.txt",
        "checkpoints",
        ".tmp-best",
        "a/.nfs1",
    ],
)
def test_a_run_with_a_file_or_link_of_a_person_stays_whole(inside: str, tmp_path: Path) -> None:
    """Checkpoints that a person moved to a larger disk, say, and linked."""
    (run, _), rejected = make_registered(tmp_path, 1), make_run(tmp_path, 2)
    for one in (run, rejected):
        add_checkpoints(one, 2, 4, 6, 8, offered=4)
        path = one.path / inside
        if inside == "checkpoints":
            path.rename(tmp_path / f"{one.path.name}-disk")
            path.symlink_to(tmp_path / f"{one.path.name}-disk")
        elif path.name.startswith((".tmp-", ".nfs")):  # as leftovers of writers are named
            path.parent.mkdir(exist_ok=True)
            path.symlink_to(tmp_path, target_is_directory=True)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text("best so far")
    done = prune(tmp_path)
    assert (done.removed, done.checkpoints, done.bytes) == ((), (), 0)
    assert done.kept[str(rejected.path)] == f"nested-tune did not write {inside} in it"
    assert [len(list_checkpoints(one.checkpoints)) for one in (run, rejected)] == [4, 4]


def test_a_run_that_cannot_be_removed_keeps_no_other(tmp_path, monkeypatch) -> None:
    first, busy, last = (make_run(tmp_path, day) for day in (1, 2, 3))
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.is_relative_to(busy.path):
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    done = prune(tmp_path)
    assert done.removed == (str(last.path), str(first.path))
    (reason,) = done.kept.values()
    assert reason.startswith("it cannot be removed: [Errno 13] Permission denied: ")


def test_a_version_keeps_its_run_after_the_project_was_moved_and_in_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    monkeypatch.chdir(before)
    run, version = make_registered(Path(), 1)
    before.rename(after)
    monkeypatch.chdir(after)
    shutil.copytree(run.path, "runs/copy")
    said = f"version {version[:12]} of {NAME} names it"
    assert prune(Path()).kept == dict.fromkeys(["runs/copy", str(run.path)], said)


def test_a_run_that_passed_and_that_no_known_registry_names_goes_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    forgotten = make_run(tmp_path, 1, reasons=(), registry={})
    by_hand, _ = make_registered(Path(), 2, registry={})  # in the default one, `registry`
    done = prune(tmp_path)
    assert (done.removed, done.unregistered) == ((), (str(forgotten.path),))
    assert done.unregistered_bytes == size_on_disk(forgotten.path) > 1000
    assert str(done.describe_unregistered()).startswith("1 run (")
    done = prune(tmp_path, unregistered=True)
    assert (done.removed, done.describe_unregistered()) == ((str(forgotten.path),), None)
    assert by_hand.path.exists()


@pytest.mark.usefixtures("no_time_to_decide")
def test_a_run_that_was_promoted_elsewhere_too_stays_after_its_own_registry_let_it_go(
    tmp_path: Path,
) -> None:
    (run, version), _ = make_registered(tmp_path, 1), make_registered(tmp_path, 2)
    promote(tmp_path / "registry", NAME, version, by="ann")
    other = tmp_path / "other"
    assert register(tmp_path / "written-1", other, "geo", {"config": {}}) == version
    add_promoted_to(run.promoted_to, other, "geo")
    for day in (3, 4):
        promote(tmp_path / "registry", NAME, make_registered(tmp_path, day)[1], by="ann")
    assert version in collect_garbage(tmp_path / "registry", NAME, by="ann", keep=0).collected
    assert prune(tmp_path).kept[str(run.path)] == f"version {version[:12]} of geo names it"
    other.rename(tmp_path / "moved")
    missing = f"its registry {other} is not found from this folder"
    assert prune(tmp_path, unregistered=True).kept[str(run.path)] == missing
    run.promoted_to.unlink()
    assert str(run.path) in prune(tmp_path).removed


def test_a_run_that_is_promoted_just_before_it_is_removed_stays(tmp_path, monkeypatch) -> None:
    """A person is faster than the lock of the run."""
    run, version = make_registered(tmp_path, 1)
    shutil.rmtree(tmp_path / "registry")
    (tmp_path / "registry").mkdir()
    locked = RunDirectory.locked

    def promote_first(folder: RunDirectory) -> Any:
        register(tmp_path / "written-1", tmp_path / "registry", NAME, {"config": {}})
        return locked(folder)

    monkeypatch.setattr(RunDirectory, "locked", promote_first)
    done = prune(tmp_path, unregistered=True)
    assert done.kept == {str(run.path): f"version {version[:12]} of {NAME} names it"}


@pytest.mark.parametrize("has_registry", [True, False])
@pytest.mark.parametrize("is_its_adapter", [True, False])
def test_a_run_that_made_no_version_goes_by_its_adapters_line_in_its_own_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_registry: bool, is_its_adapter: bool
) -> None:
    own = tmp_path / "runs" / "own"
    run = make_run(tmp_path, 1, reasons=()) if has_registry else finished_run(own)
    adapter = str(Run(run).version) if is_its_adapter else "a" * 64
    line = {"outcome": Outcome.KEPT_CHAMPION, "run": run.path.name, "adapter": adapter}
    record_trial(tmp_path / "registry", NAME, "c" * 64, "not better", **line)
    monkeypatch.chdir(tmp_path)  # registry/ is the default one
    is_told = has_registry and is_its_adapter
    assert prune(tmp_path).removed == ((str(run.path),) if is_told else ())


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [
        ("wandb/why.md", False),
        ("wandb/offline-run-20261128_101010-ab12/notes.md", False),
        ("wandb/offline-run-20261128_101010-ab12/run-ab12.wandb", True),
        ("swanlog/notes.md", False),
        ("rooms/mine/paper.tex", False),
        ("rooms/preferences/notes.md", False),
        ("rooms/preferences/reference-likelihoods.json", True),
        ("checkpoints/step-12345678/adapters.safetensors", True),
        ("checkpoints/step-1/notes.md", False),
    ],
)
def test_a_file_whose_name_no_writer_declares_keeps_a_run(
    tmp_path: Path, name: str, is_ours: bool
) -> None:
    run = make_run(tmp_path, 1)
    (run.path / name).parent.mkdir(parents=True)
    (run.path / name).write_bytes(b"")
    assert prune(tmp_path).removed == ((str(run.path),) if is_ours else ())


def test_a_run_with_another_adapter_than_was_judged_is_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1)
    shutil.copytree(write_run(tmp_path / "other", 2) / "adapter", run.adapter, dirs_exist_ok=True)
    assert prune(tmp_path).kept == {str(run.path): "its adapter is not the one that was judged"}


def test_registries_are_read_again_only_where_they_have_changed(tmp_path, monkeypatch) -> None:
    make_registered(tmp_path, 9)
    for seed in range(4):
        make_run(tmp_path, seed)
    read = Mock(side_effect=reading)
    monkeypatch.setattr(run_removal, "reading", read)
    assert len(prune(tmp_path).removed) == 4
    assert read.call_count == 1


def test_a_registry_that_cannot_be_read_keeps_every_run(tmp_path: Path) -> None:
    named, version = make_registered(tmp_path, 1)
    runs = [named, make_run(tmp_path, 2)]
    provenance = tmp_path / "registry" / NAME / "versions" / version / "provenance.json"
    provenance.chmod(0o600)
    provenance.write_text("{")
    with pytest.raises(DamagedError, match="provenance"):
        prune_runs(list_runs(tmp_path / "runs"), keep=0)
    assert all(run.path.exists() for run in runs)


def test_a_version_whose_folder_is_lost_keeps_every_run(tmp_path: Path) -> None:
    named, version = make_registered(tmp_path, 1)
    runs = [named, make_run(tmp_path, 2)]
    shutil.rmtree(tmp_path / "registry" / NAME / "versions" / version)
    with pytest.raises(DamagedError, match="promote RUN_DIR"):
        prune_runs(list_runs(tmp_path / "runs"), keep=0)
    assert all(run.path.exists() for run in runs)


def test_a_negative_number_of_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--keep -1"):
        prune_runs(list_runs(tmp_path), keep=-1)


def test_the_list_says_the_adapter_the_outcome_and_the_minutes(tmp_path: Path) -> None:
    rejected = make_run(tmp_path, 1)
    make_registered(tmp_path, 2)
    unregistered = make_run(tmp_path, 3, text="of another adapter", reasons=())
    bad = [Finding("train.jsonl", 7, "error", "bad-json", "column 46")]
    refused = begin_run(tmp_path / "runs" / "20261104T020000Z-00000004", findings=bad)
    rows = {run.name: list_row(run) for run in list_runs(tmp_path / "runs")}
    assert rows[rejected.path.name][2] == "Rejected: worse"
    assert rows[refused.path.name][2] == "Failed: data"
    _, adapter, outcome, *_, minutes = rows[unregistered.path.name]
    assert (adapter, outcome, minutes) == (
        NAME,
        "Verified: passed, better; 2 of 3 right; not registered",
        "0.0",
    )
