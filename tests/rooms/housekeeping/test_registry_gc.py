"""gc removes what nobody needs, says so in the history, and leaves the rest as it was."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import ConfigError, DamagedError
from nested_core.registry import (
    Decision,
    history,
    ledger,
    link_and_views,
    list_versions,
    promotion_outcome,
    queries,
    read_champion,
    rollback,
)
from nested_core.registry.data_store import RunExamples, read_stored_data
from nested_core.registry.ledger import read_ledger
from nested_core.registry.versions import inspect_version
from nested_core.rooms.housekeeping import garbage_collection, registry_audit
from nested_core.rooms.housekeeping.garbage_collection import collect_garbage, forget_rows
from nested_core.rooms.housekeeping.registry_audit import audit
from tests.builders.registering import promote, register
from tests.core.registry.states import NAME, assert_settled, clock_at, collected

pytestmark = pytest.mark.usefixtures("no_time_to_decide")


@pytest.fixture
def five(add, registry) -> list[str]:
    """Versions 1 to 5, of which 1, 2 and 3 were champion in turn."""
    versions = [add(seed) for seed in range(1, 6)]
    for version in versions[:3]:
        promote(registry, NAME, version, by="ann")
    return versions


def test_champion_and_what_a_rollback_goes_to_are_never_removed(five, registry):
    assert collected(registry, 0) == {five[0], five[3], five[4]}
    assert list_versions(registry, NAME) == sorted(five[1:3])
    assert rollback(registry, NAME, by="ann") == Decision("rolled_back", five[1], five[2])
    assert_settled(registry)


def test_after_a_rollback_the_version_that_it_left_is_what_the_next_goes_to(five, registry):
    rollback(registry, NAME, to=five[0], by="ann")
    assert collected(registry, 0) == {five[1], five[3], five[4]}
    assert rollback(registry, NAME, by="ann").version == five[2]


def test_rollbacks_pass_over_versions_that_were_collected(five, registry):
    promote(registry, NAME, five[0], by="ann")
    promote(registry, NAME, five[3], by="ann")
    assert collected(registry, 3) == {five[1], five[4]}  # champions were 1, 2, 3, 1 and 4
    assert [rollback(registry, NAME, by="ann").version for _ in range(3)] == [
        five[0],
        five[2],
        five[0],
    ]
    with pytest.raises(ConfigError, match="no version to go back to"):
        rollback(registry, NAME, by="ann")
    assert_settled(registry)


def test_a_version_between_two_times_of_the_same_champion_leaves_one_of_them(five, registry):
    rollback(registry, NAME, to=five[1], by="ann")
    promote(registry, NAME, five[4], by="ann")
    assert five[2] in collected(registry, 0)  # champions 1, 2, 3, 2 and 5
    assert rollback(registry, NAME, by="ann").version == five[1]
    with pytest.raises(ConfigError, match="no version to go back to"):
        rollback(registry, NAME, by="ann")


@pytest.mark.parametrize(
    ("keep", "gone"), [(1, [0, 3, 4]), (3, [3, 4]), (4, [3]), (5, []), (99, [])]
)
def test_versions_registered_or_in_use_last_are_kept(five, registry, keep, gone):
    assert collected(registry, keep) == {five[index] for index in gone}


def test_history_says_what_was_collected_and_who_is_champion(five, registry):
    before = (registry / NAME / "history.jsonl").read_bytes()
    collect_garbage(registry, NAME, by="bob", keep=4)
    lines = history(registry, NAME)
    assert (registry / NAME / "history.jsonl").read_bytes().startswith(before)
    assert len(lines) == 4
    assert (
        lines[-1].items()
        >= {"action": "collected", "version": five[3], "previous": five[2], "by": "bob"}.items()
    )


def test_audit_agrees_afterwards_and_a_second_gc_finds_nothing(five, registry):
    collect_garbage(registry, NAME, by="ann", keep=0)
    assert audit(registry, NAME).is_sound
    before = (registry / NAME / "history.jsonl").read_bytes()
    assert collected(registry, 0) == set()
    assert (registry / NAME / "history.jsonl").read_bytes() == before
    assert_settled(registry)


def test_dry_run_names_the_same_and_touches_nothing(five, registry):
    (registry / NAME / "versions" / ".tmp-abc").mkdir()
    before = {path: path.lstat().st_mtime_ns for path in registry.rglob("*")}
    plan = collect_garbage(registry, NAME, by="ann", keep=3, dry_run=True)
    assert {path: path.lstat().st_mtime_ns for path in registry.rglob("*")} == before
    assert plan.is_dry_run
    assert plan.leftovers == ("versions/.tmp-abc",)
    done = collect_garbage(registry, NAME, by="ann", keep=3)
    assert (done.collected, done.kept, done.bytes) == (plan.collected, plan.kept, plan.bytes)
    assert done.leftovers == plan.leftovers
    assert done.bytes > 1000
    assert not (registry / NAME / "versions" / ".tmp-abc").exists()


def test_barred_version_that_was_collected_and_registered_again_is_still_barred(
    five, registry, make_run
):
    rollback(registry, NAME, by="ann")
    promote(registry, NAME, five[4], by="ann")
    promote(registry, NAME, five[3], by="ann")
    assert five[2] in collected(registry, 0)
    run = registry.parent / "run-3"
    assert register(run, registry, NAME, {"again": True}) == five[2]
    assert promote(registry, NAME, five[2], by="flow", automatic=True).outcome == "barred"
    assert promote(registry, NAME, five[2], by="ann").outcome == "promoted"
    assert_settled(registry)


def test_collected_version_cannot_be_rolled_back_to(five, registry):
    collect_garbage(registry, NAME, by="ann", keep=0)
    with pytest.raises(ConfigError, match="names no versions"):
        rollback(registry, NAME, to=five[0], by="ann")


def test_version_deleted_by_hand_is_still_damage_beside_collected_ones(five, registry):
    collect_garbage(registry, NAME, by="ann", keep=0)
    (registry / NAME / "versions" / five[1]).rename(registry.parent / "gone")
    assert [finding.file.name for finding in audit(registry, NAME).findings] == [five[1]]
    with pytest.raises(DamagedError):
        rollback(registry, NAME, by="ann")


def test_link_in_the_place_of_a_version_is_removed_and_its_target_left_alone(
    five, registry, tmp_path
):
    place, outside = registry / NAME / "versions" / five[4], tmp_path / "outside"
    place.rename(outside)
    place.symlink_to(outside)
    assert five[4] in collected(registry, 0)
    assert (outside / "adapters.safetensors").is_file()
    assert not place.is_symlink()


def test_the_lineage_of_the_champion_stays_whatever_came_after_it(add, registry, make_run):
    lineage: list[str] = []
    for seed in range(1, 4):
        initial = lineage[-1] if lineage else "0" * 64
        run = make_run(seed, initial=initial)
        lineage.append(register(run, registry, NAME, {"parent": lineage[-1] if lineage else None}))
        promote(registry, NAME, lineage[-1], by="ann")
    later = [add(seed) for seed in range(10, 14)]
    assert collected(registry, 3) == {later[0]}
    assert collected(registry, 2) == {lineage[0], later[1]}


@pytest.mark.parametrize("keeps", [False, True])
def test_ancestors_stay_down_to_the_oldest_of_which_the_store_has_examples(
    registry, make_run, keeps: bool
):
    lineage: list[str] = []
    told = {"config": {"registry": {"keep_data": keeps}}}
    for seed in range(1, 5):
        parent = lineage[-1] if lineage else None
        run = make_run(seed, initial=parent or "0" * 64)
        rows = RunExamples([{"text": f"night {seed}"}], [], max_bytes=1_000)
        version = register(run, registry, NAME, {"parent": parent, **told}, examples=rows)
        lineage.append(version)
        promote(registry, NAME, version, by="ann")
    assert collected(registry, 0) == set()
    (registry / NAME / "data" / f"{lineage[1]}.json").unlink()  # as where none are kept
    assert collected(registry, 0) == set()  # through the second the first is known
    (registry / NAME / "data" / f"{lineage[0]}.json").unlink()
    assert collected(registry, 0) == (set() if keeps else {lineage[0], lineage[1]})


def test_rows_whose_list_was_lost_stay_and_audit_names_the_list(
    make_run: Callable[..., Path], registry: Path
) -> None:
    def add(seed: int, *, keeps: bool) -> str:
        told = {"config": {"registry": {"keep_data": keeps}}}
        rows = RunExamples([{"text": f"night {seed}"}], []) if keeps else None
        return register(make_run(seed), registry, NAME, told, examples=rows)

    version, _ = add(1, keeps=True), add(2, keeps=False)
    packs = [*(registry / NAME / "data").glob("*.jsonl")]
    assert audit(registry, NAME).notes == ()
    listed = registry / NAME / "data" / f"{version}.json"
    before = listed.read_bytes()
    listed.unlink()
    (note,) = audit(registry, NAME).notes
    assert note.startswith(f"{listed} is missing: ")
    for dry_run in (True, False):
        assert collect_garbage(registry, NAME, by="ann", dry_run=dry_run).rows == 0
    assert [*(registry / NAME / "data").glob("*.jsonl")] == packs
    for rows in ([{"text": "a row of nobody"}], []):
        forget_rows(registry, NAME, rows.__contains__, by="ann")
    row = {"text": "night 1"}
    asked = forget_rows(registry, NAME, lambda one: one == row, by="ann", dry_run=True)
    assert asked == {version: 1}, "it may be of the version whose list was lost"
    provenance = registry / NAME / "versions" / version / "provenance.json"
    recorded = provenance.read_bytes()
    for damaged in ({"config": [1]}, {"config": {"registry": [3]}}):
        provenance.chmod(0o600)
        provenance.write_text(json.dumps(damaged))
        assert audit(registry, NAME).findings
        assert collect_garbage(registry, NAME, by="ann", dry_run=True).rows == 0
    provenance.write_bytes(recorded)
    store = listed.parent.rename(registry / NAME / "aside")
    assert audit(registry, NAME).notes == (), "as a mirror's copy, which has no rows"
    store.rename(listed.parent)
    listed.write_bytes(before)
    stored = read_stored_data(registry, NAME, version)
    assert stored is not None
    assert [each.row for each in stored.train] == [{"text": "night 1"}]
    assert audit(registry, NAME).notes == ()


def test_a_row_that_was_forgotten_does_not_come_back_with_a_version_whose_list_was_lost(
    make_run: Callable[..., Path], registry: Path
) -> None:
    told = {"config": {"registry": {"keep_data": True}}}
    shared = {"text": "a row of two versions"}
    rows = [[shared, {"text": f"night {seed}"}] for seed in (1, 2)]
    runs = make_run(1), make_run(2)
    first, second = (
        register(run, registry, NAME, told, examples=RunExamples(of_run, []))
        for run, of_run in zip(runs, rows, strict=True)
    )
    (registry / NAME / "data" / f"{first}.json").unlink()
    assert forget_rows(registry, NAME, [shared].__contains__, by="ann") == {second: 1}
    register(runs[0], registry, NAME, told, examples=RunExamples(rows[0], []))
    packs = [*(registry / NAME / "data").glob("*.jsonl")]
    assert packs
    assert not any(shared["text"] in pack.read_text() for pack in packs)
    stored = read_stored_data(registry, NAME, first)
    assert stored is not None
    assert [each.row for each in stored.train] == rows[0][1:], "its other row is its own again"
    collect_garbage(registry, NAME, by="ann")
    assert read_stored_data(registry, NAME, first) == stored


def test_a_list_is_lost_too_if_a_later_run_alone_had_the_rows_stored(
    make_run: Callable[..., Path], registry: Path
) -> None:
    run = make_run(1)

    def register_with(*, keeps: bool) -> str:
        told = {"config": {"registry": {"keep_data": keeps}}}
        rows = RunExamples([{"text": "a row"}], []) if keeps else None
        return register(run, registry, NAME, told, examples=rows)

    version = register_with(keeps=False)
    assert audit(registry, NAME).notes == ()
    assert register_with(keeps=True) == version
    (registry / NAME / "data" / f"{version}.json").unlink()
    assert audit(registry, NAME).notes
    assert collect_garbage(registry, NAME, by="ann").rows == 0


@pytest.mark.parametrize("damage", ["lost", "no list", "an altered row"])
def test_the_advice_of_an_audit_gives_examples_up_and_changes_no_decision(
    damage: str, make_run: Callable[..., Path], registry: Path
) -> None:
    told = {"config": {"registry": {"keep_data": True, "promote": "approve"}}}
    rows = [{"text": "night 1"}, {"text": "night 2"}]
    runs = make_run(1), make_run(2)
    first, _ = (
        register(run, registry, NAME, told, examples=RunExamples([row], []))
        for run, row in zip(runs, rows, strict=True)
    )
    listed, before = registry / NAME / "data" / f"{first}.json", history(registry, NAME)
    if damage == "an altered row":
        for pack in listed.parent.glob("*.jsonl"):
            pack.write_text(pack.read_text().replace("night 1", "night 3"))
    else:
        listed.unlink() if damage == "lost" else listed.write_text("{}")
    report = audit(registry, NAME)
    (advice,) = [*report.notes, *(one.advice or one.message for one in report.findings)]
    assert "if no row was forgotten since" in advice
    subprocess.run(["sh", "-c", advice.split("`")[1]], check=True)
    assert audit(registry, NAME) == replace(report, findings=(), notes=())
    assert history(registry, NAME) == before
    assert collect_garbage(registry, NAME, by="ann").rows == 1, "nothing keeps it any more"
    assert promotion_outcome.may_be_promoted(registry / NAME, first, read_ledger(registry / NAME))
    register(runs[0], registry, NAME, told, examples=RunExamples(rows[:1], []))
    stored = read_stored_data(registry, NAME, first)
    assert stored is not None
    assert [each.row for each in stored.train] == rows[:1]


@pytest.mark.parametrize("removal", ["collected", "forgotten"])
def test_a_row_that_was_forgotten_does_not_come_back_with_a_removed_version(
    removal: str, make_run: Callable[..., Path], registry: Path
) -> None:
    told = {"config": {"registry": {"keep_data": True}}}
    rows = [{"text": "a row of two versions"}, {"text": "night 1"}]
    run = make_run(1)
    version = register(run, registry, NAME, told, examples=RunExamples(rows, []))
    register(make_run(2), registry, NAME, told, examples=RunExamples(rows[:1], []))
    if removal == "collected":
        assert collected(registry, 1) == {version}
    else:
        (registry / NAME / "versions" / version).rename(registry / "elsewhere")
        garbage_collection.forget(registry, NAME, version, by="ann", reason="a bad disk")
    forget_rows(registry, NAME, rows[:1].__contains__, by="ann")
    assert history(registry, NAME)[-2]["version"] is None
    register(run, registry, NAME, told, examples=RunExamples(rows, []))
    assert not any("two versions" in p.read_text() for p in registry.rglob("data/*.jsonl"))
    collect_garbage(registry, NAME, by="ann")
    other = register(make_run(3), registry, NAME, told, examples=RunExamples(rows[1:], []))
    stored = read_stored_data(registry, NAME, other)
    assert stored is not None
    assert [each.row for each in stored.train] == rows[1:], "a new version has all its rows"


def test_a_row_whose_pack_was_lost_can_be_forgotten(
    make_run: Callable[..., Path], registry: Path
) -> None:
    told = {"config": {"registry": {"keep_data": True}}}
    run, row = make_run(1), {"text": "a row"}
    version = register(run, registry, NAME, told, examples=RunExamples([row], []))
    (pack,) = (registry / NAME / "data").glob("*.jsonl")
    pack.unlink()
    assert forget_rows(registry, NAME, [row].__contains__, by="ann") == {}
    (registry / NAME / "data" / f"{version}.json").unlink()
    register(run, registry, NAME, told, examples=RunExamples([row], []))
    assert not any((registry / NAME / "data").glob("*.jsonl"))


def test_a_version_whose_data_had_changed_has_a_list_and_a_lost_one_gets_none(
    make_run: Callable[..., Path], registry: Path
) -> None:
    told = {"config": {"registry": {"keep_data": True}}}
    of_changed_data = RunExamples([], [])
    of_changed_data.listed.dropped = 2
    runs = make_run(1), make_run(2)
    first = register(runs[0], registry, NAME, told, examples=RunExamples([{"text": "a row"}], []))
    second = register(runs[1], registry, NAME, told, examples=of_changed_data)
    stored = read_stored_data(registry, NAME, second)
    assert stored is not None
    assert stored.missing == 2
    assert audit(registry, NAME).notes == ()
    (registry / NAME / "data" / f"{first}.json").unlink()
    register(runs[0], registry, NAME, told, examples=of_changed_data)
    assert read_stored_data(registry, NAME, first) is None
    assert collect_garbage(registry, NAME, by="ann").rows == 0, "its row may be wanted"
    register(runs[1], registry, NAME, told, examples=RunExamples([{"text": "sound"}], []))
    sound = read_stored_data(registry, NAME, second)
    assert sound is not None
    assert [each.row for each in sound.train] == [{"text": "sound"}], "its data is back"


def test_a_bounded_store_removes_nothing_while_a_list_is_lost(
    make_run: Callable[..., Path], registry: Path
) -> None:
    told = {"config": {"registry": {"keep_data": True}}}

    def add(seed: int) -> str:
        rows = [{"text": f"{seed} {number} " + "x" * 400} for number in range(3)]
        examples = RunExamples(rows, [], max_bytes=2_000)
        return register(make_run(seed), registry, NAME, told, examples=examples)

    first = add(1)
    listed = registry / NAME / "data" / f"{first}.json"
    before = listed.read_bytes()
    listed.unlink()
    second = add(2)
    stored = read_stored_data(registry, NAME, second)
    assert stored is not None
    assert (len(stored.train), stored.missing) == (3, 0)
    listed.write_bytes(before)
    third = add(3)
    counts = [read_stored_data(registry, NAME, version) for version in (first, second, third)]
    assert [stored and len(stored.train) for stored in counts] == [0, 0, 3]


def test_the_lineage_of_a_version_that_may_be_promoted_stays(make_run, registry, monkeypatch):
    lineage: list[str] = []
    for seed in range(1, 6):  # of two nights after the first, then of two after it as well
        parent = lineage[-1] if seed in (2, 3, 5) else lineage[0] if lineage else None
        run = make_run(seed, initial=parent or "0" * 64)
        rows = RunExamples([{"text": f"night {seed}"}], [], max_bytes=1_000)
        lineage.append(register(run, registry, NAME, {"parent": parent}, examples=rows))
        if seed in (1, 4):
            promote(registry, NAME, lineage[-1], by="ann")
    champion, waits = lineage[3], lineage[2]
    assert read_champion(registry, NAME) == champion
    monkeypatch.setattr(
        garbage_collection, "may_be_promoted", lambda folder, version, ledger: version == waits
    )
    assert collected(registry, 0) == {lineage[4]}


def test_a_version_with_a_file_of_a_person_stays(five, registry):
    notes = registry / NAME / "versions" / five[4] / "notes.txt"
    notes.parent.chmod(0o755)
    notes.write_text("best so far")
    assert collected(registry, 0) == {five[0], five[3]}
    assert notes.read_text() == "best so far"


def test_negative_keep_is_refused(five, registry):
    with pytest.raises(ConfigError, match="--keep -1"):
        collect_garbage(registry, NAME, by="ann", keep=-1)


def test_gc_before_the_first_promotion_keeps_the_newest(add, registry):
    versions = [add(seed) for seed in range(3)]
    assert collected(registry, 1) == set(versions[:2])
    assert read_champion(registry, NAME) is None


@pytest.mark.parametrize("comes_back", [False, True])
def test_audit_meanwhile_takes_a_collected_version_for_no_damage(
    five, registry, tmp_path, monkeypatch, comes_back
):
    """A version that came back has another manifest than the one the history knew before."""

    def between(*arguments: Any) -> Any:
        monkeypatch.undo()
        assert five[0] in collected(registry, 0)
        if comes_back:
            assert register(tmp_path / "run-1", registry, NAME, {}) == five[0]
        return inspect_version(*arguments)

    monkeypatch.setattr(registry_audit, "inspect_version", between)
    assert audit(registry, NAME).findings == ()
    assert (five[0] in list_versions(registry, NAME)) == comes_back


def test_audit_meanwhile_takes_a_version_removed_by_hand_for_damage(five, registry, monkeypatch):
    place = registry / NAME / "versions" / five[0]

    def between(*arguments: Any) -> Any:
        monkeypatch.undo()
        place.rename(registry / "elsewhere")
        return inspect_version(*arguments)

    monkeypatch.setattr(registry_audit, "inspect_version", between)
    assert [finding.file for finding in audit(registry, NAME).findings] == [place]


def test_reader_meanwhile_is_given_the_new_champion(five, registry, monkeypatch):
    """The link was read, then the champion moved on twice and a gc took what the link had said."""

    def between(folder: Path) -> str | None:
        monkeypatch.undo()
        old = link_and_views.read_link(folder)
        for version in five[3:]:
            promote(registry, NAME, version, by="ann")
        assert old in collected(registry, 0)
        return old

    monkeypatch.setattr(queries, "read_link", between)
    assert read_champion(registry, NAME) == five[4]


def test_the_version_that_a_rollback_left_is_kept_until_the_next_change(five, registry):
    for version in five[:3]:
        rollback(registry, NAME, to=version, by="ann")
    for _ in range(4):
        rollback(registry, NAME, by="ann")
    left = history(registry, NAME)[-1]["previous"]
    assert left not in collected(registry, 0)
    assert left in list_versions(registry, NAME)
    assert read_champion(registry, NAME) in list_versions(registry, NAME)


class TestTimeToDecide:
    """What is new is kept until it may have been promoted."""

    @pytest.fixture(autouse=True)
    def an_hour(self, no_time_to_decide: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(promotion_outcome, "UNPROMOTED_GRACE_TIME", timedelta(hours=1))

    def test_a_version_between_register_and_promote_is_kept(self, five, registry):
        plan = collect_garbage(registry, NAME, by="ann", keep=0, dry_run=True)
        assert plan.collected == (five[0],)
        assert collected(registry, 0) == {five[0]}
        assert promote(registry, NAME, five[3], by="ann").outcome == "promoted"

    @pytest.mark.parametrize(("minutes", "is_kept"), [(59, True), (61, False), (-600, True)])
    def test_it_is_kept_for_an_hour_and_where_the_clock_has_gone_back(
        self, five, registry, monkeypatch, minutes, is_kept
    ):
        now = datetime.now(UTC) + timedelta(minutes=minutes)
        monkeypatch.setattr(promotion_outcome, "datetime", clock_at(now))
        assert (five[3] not in collected(registry, 0)) == is_kept

    def test_a_removal_that_was_cut_short_is_finished_and_what_is_registered_again_is_new(
        self, five, registry, tmp_path, monkeypatch
    ):
        first = five[0]

        def fail(*_: object) -> None:
            raise OSError("killed")

        with monkeypatch.context() as patch:
            patch.setattr(link_and_views.NameFolder, "delete_version", fail)
            with pytest.raises(OSError, match="killed"):
                collect_garbage(registry, NAME, by="ann", keep=0)
        assert history(registry, NAME)[-1]["action"] == "collected"
        assert first in list_versions(registry, NAME)
        assert audit(registry, NAME).is_sound
        assert collected(registry, 0) == set()
        assert first not in list_versions(registry, NAME)
        assert register(tmp_path / "run-1", registry, NAME, {}) == first
        assert first not in collected(registry, 0)

    def test_one_that_was_champion_since_it_was_registered_is_not_new(self, five, registry):
        promote(registry, NAME, five[3], by="ann")
        promote(registry, NAME, five[4], by="ann")
        promote(registry, NAME, five[2], by="ann")
        assert five[3] in collected(registry, 0)


def test_versions_used_last_are_kept_whatever_the_clocks_were(five, registry, monkeypatch):
    """The machine that made the last two changes has a clock that is years behind."""
    monkeypatch.setattr(ledger, "datetime", clock_at(datetime(2001, 1, 1, tzinfo=UTC)))
    promote(registry, NAME, five[3], by="ann")
    promote(registry, NAME, five[0], by="ann")
    promote(registry, NAME, five[1], by="ann")
    assert collected(registry, 3) == {five[2], five[4]}
    assert audit(registry, NAME).is_sound


def test_a_version_registered_by_a_machine_whose_clock_is_behind_is_the_newest(
    five, registry, make_run, monkeypatch
):
    monkeypatch.setattr(ledger, "datetime", clock_at(datetime(2001, 1, 1, tzinfo=UTC)))
    newest = register(make_run(9), registry, NAME, {})
    assert newest not in collected(registry, 1)
