"""Audit holds link, record, history and versions against each other; writers mend the history."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nested_core.errors import DamagedError
from nested_core.registry import history, read_champion, rollback
from nested_core.registry.data_store import RunExamples
from nested_core.rooms.housekeeping.garbage_collection import collect_garbage
from nested_core.rooms.housekeeping.registry_audit import audit
from tests.builders.registering import promote, register
from tests.core.registry.states import NAME, chained_line


def move_link(registry: Path, version: str | None) -> None:
    link = registry / NAME / "champion"
    link.unlink()
    if version is not None:
        link.symlink_to(f"versions/{version}")


def actions(registry: Path) -> list[tuple[str, str | None, str | None]]:
    return [(line["action"], line["version"], line["previous"]) for line in history(registry, NAME)]


def times(registry: Path) -> dict[Path, int]:
    return {p: p.lstat().st_mtime_ns for p in registry.rglob("*") if p.name != ".lock"}


def found_files(registry: Path) -> set[str]:
    return {finding.file.name for finding in audit(registry, NAME).findings}


def test_sound_registry_has_no_finding(three, registry):
    rollback(registry, NAME, by="ann")
    report = audit(registry, NAME)
    assert report.is_sound
    assert report.champion == three[0]
    assert report.versions == tuple(sorted(three))
    assert report.unfinished is None


@pytest.mark.parametrize("target", [0, 2, None])
def test_link_moved_by_hand_is_found_and_the_history_then_follows_the_link(three, registry, target):
    version = None if target is None else three[target]
    move_link(registry, version)
    findings = {finding.file.name: finding.message for finding in audit(registry, NAME).findings}
    assert findings.keys() == {"champion"}
    now = "nothing" if version is None else version[:12]
    assert (
        f"points to {now}, but the history's last line leaves {three[1][:12]}:"
        in (findings["champion"])
    )
    assert history(registry, NAME)[-1]["unfinished"] is True
    assert promote(registry, NAME, three[1], by="ann").previous == version
    assert audit(registry, NAME).is_sound


def test_link_moved_by_hand_to_a_barred_version_does_not_lift_the_bar(three, registry):
    first, second, _ = three
    rollback(registry, NAME, to=first, by="ann")
    rollback(registry, NAME, to=three[2], by="ann")
    move_link(registry, second)
    promote(registry, NAME, first, by="ann")
    assert actions(registry)[4] == ("moved", second, three[2])
    assert promote(registry, NAME, second, by="flow", automatic=True).outcome == "barred"


def test_a_last_line_without_its_link_is_a_change_that_the_next_writer_finishes(three, registry):
    first, second, third = three
    line = history(registry, NAME)[-1] | {"version": third, "previous": second}
    with (registry / NAME / "history.jsonl").open("ab") as file:
        file.write(chained_line(registry, line))
    report = audit(registry, NAME)
    assert (report.findings, report.champion, report.unfinished) == ((), second, third)
    assert read_champion(registry, NAME) == second
    assert rollback(registry, NAME, by="ann").version == second
    assert actions(registry)[2:] == [("promote", third, second), ("rollback", second, third)]
    assert audit(registry, NAME).unfinished is None


@pytest.mark.parametrize("fragment", [b"{", b'{"action": "promote", "vers', b"\0" * 64, b"{}"])
def test_torn_last_line_is_left_out_by_readers_and_cut_by_the_next_writer(
    three, registry, fragment
):
    first, second, third = three
    path = registry / NAME / "history.jsonl"
    path.write_bytes(path.read_bytes() + fragment)
    assert len(history(registry, NAME)) == 2
    assert read_champion(registry, NAME) == second
    assert audit(registry, NAME).is_sound
    promote(registry, NAME, third, by="ann")
    assert actions(registry)[2:] == [("promote", third, second)]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_a_torn_line_is_cut_on_the_disk_before_another_is_written(three, registry, monkeypatch):
    path = registry / NAME / "history.jsonl"
    path.write_bytes(path.read_bytes() + b"{")
    calls = []
    for name in ("ftruncate", "fsync", "write"):
        call = getattr(os, name)

        def note(descriptor, *rest, name=name, call=call):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                calls.append(name)
            return call(descriptor, *rest)

        monkeypatch.setattr(os, name, note)
    promote(registry, NAME, three[2], by="ann")
    assert calls[:2] == ["ftruncate", "fsync"]
    assert "write" in calls


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "null",
        "{}",
        "not json",
        '{"action": "steal", "version": null, "previous": null, "time": "", "by": ""}',
        '{"action": "promote", "version": 1, "previous": null, "time": "", "by": ""}',
        "[" * 100_000,
    ],
)
def test_unreadable_line_is_damage_and_is_named_by_number(three, registry, line):
    path = registry / NAME / "history.jsonl"
    path.write_text(path.read_text() + line + "\n")
    for call in (
        lambda: history(registry, NAME),
        lambda: promote(registry, NAME, three[2], by="ann"),
        lambda: rollback(registry, NAME, by="ann"),
    ):
        with pytest.raises(DamagedError, match=r"history\.jsonl, line 6"):
            call()
    assert found_files(registry) == {"history.jsonl"}
    assert read_champion(registry, NAME) == three[1]


def test_link_in_place_of_champion_json_is_damage_and_its_target_left_alone(
    three, registry, tmp_path
):
    path, outside = registry / NAME / "champion.json", tmp_path / "outside.json"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)
    assert found_files(registry) == {"champion.json"}
    before = outside.read_bytes()
    with pytest.raises(DamagedError, match=r"champion\.json does not hold the hash"):
        promote(registry, NAME, three[2], by="ann")
    assert path.is_symlink()
    assert outside.read_bytes() == before


def test_every_damage_is_reported_at_once(three, registry):
    folder = registry / NAME
    for version in three:
        (folder / "versions" / version / "gate.json").unlink()
    (folder / "champion.json").unlink()
    assert len(audit(registry, NAME).findings) == 4


def test_a_name_in_the_old_layout_is_refused_with_the_cure_and_nothing_is_written(
    three, make_run, registry
):
    """Its lines began with a promotion; before one, there were versions and no history."""
    path = registry / NAME / "history.jsonl"
    first = json.loads(path.read_bytes().splitlines()[0])
    del first["layout"]
    run = make_run(9)
    calls = [
        lambda: promote(registry, NAME, three[2], by="ann"),
        lambda: register(run, registry, NAME, {}),
        lambda: history(registry, NAME),
    ]
    for content in (json.dumps(first) + "\n", None):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        else:
            for name in ("champion", "champion.json"):
                (registry / NAME / name).unlink()
            provenance = registry / NAME / "versions" / three[0] / "provenance.json"
            provenance.chmod(0o644)
            provenance.write_text(json.dumps({"registered_after": "x"}))
            calls = calls[:2]
        before = times(registry)
        for call in calls:
            with pytest.raises(DamagedError, match="is of an earlier nested-tune.* move the"):
                call()
        assert found_files(registry) >= {"history.jsonl"}
        assert {
            p: p.lstat().st_mtime_ns for p in registry.rglob("*") if p.name != ".lock"
        } == before


@pytest.mark.timeout(60)  # where somebody opens the pipe, it waits for ever
def test_a_pipe_in_the_place_of_the_data_store_is_damage_that_nobody_waits_for(
    make_run: Callable[..., Path], registry: Path
) -> None:
    register(make_run(1), registry, NAME, {}, examples=RunExamples([{"text": "night"}], []))
    store = registry / NAME / "data"
    shutil.rmtree(store)
    os.mkfifo(store)
    (finding,) = audit(registry, NAME).findings
    assert finding.file == store
    assert f"{store} is not the folder" in finding.message
    with pytest.raises(DamagedError, match="is not the folder of the stored examples"):
        collect_garbage(registry, NAME, by="ann")
