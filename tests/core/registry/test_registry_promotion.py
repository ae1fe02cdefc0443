"""The champion moves one verified step at a time, and every step is in the history."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nested_core.errors import ConfigError, DamagedError
from nested_core.registry import Decision, history, read_champion, rollback
from nested_core.registry.ledger import read_ledger
from nested_core.storage.adapter import read_adapter
from nested_core.storage.manifest import read_manifest
from tests.builders.registering import promote
from tests.core.registry.states import NAME
from tests.registry_care import audit


def test_first_promotion_points_a_relative_link_at_the_version(add, registry):
    version = add(1)
    assert promote(registry, NAME, version, by="ann") == Decision("promoted", version, None)
    assert os.readlink(registry / NAME / "champion") == f"versions/{version}"
    assert read_champion(registry, NAME) == version
    assert (registry / NAME / "champion" / "adapters.safetensors").is_file()


def test_link_survives_a_move_of_the_whole_registry(three, registry, tmp_path):
    moved = registry.rename(tmp_path / "moved")
    assert read_champion(moved, NAME) == three[1]
    assert (moved / NAME / "champion" / "adapter_config.json").is_file()


def test_history_says_who_changed_what_to_what_and_when(three, registry):
    first, second, _ = three
    lines = history(registry, NAME)
    assert [line["action"] for line in lines] == ["promote", "promote"]
    assert [(line["version"], line["previous"]) for line in lines] == [
        (first, None),
        (second, first),
    ]
    assert {line["by"] for line in lines} == {"ann"}
    assert datetime.fromisoformat(lines[0]["time"]).tzinfo == UTC
    manifest = read_manifest(registry / NAME / "versions" / second)
    assert lines[1]["manifest"] == manifest["digest"]


def test_history_is_one_json_object_a_line(three, registry):
    lines = (registry / NAME / "history.jsonl").read_text().splitlines()
    told = [line for line in map(json.loads, lines) if line["action"] != "registered"]
    assert told == history(registry, NAME)
    assert len(lines) == 5


def test_champion_json_tells_the_last_change(three, registry):
    record = json.loads((registry / NAME / "champion.json").read_text())
    last = history(registry, NAME)[-1]
    line = (registry / NAME / "history.jsonl").read_bytes().splitlines(keepends=True)[-1]
    end = {"last_line_sha256": hashlib.sha256(line).hexdigest()}
    assert record == {f: last[f] for f in ("version", "previous", "time", "by")} | end


def test_promoting_the_champion_again_changes_nothing(three, registry):
    before = history(registry, NAME)
    result = promote(registry, NAME, three[1], by="bob")
    assert result == Decision("already_champion", three[1], three[1])
    assert history(registry, NAME) == before


def test_expected_champion_may_be_a_prefix(three, registry):
    result = promote(registry, NAME, three[2], by="ann", expected_champion=three[1][:8])
    assert result.outcome == "promoted"


@pytest.mark.parametrize("expected", ["first", "none", "unknown", "too short"])
def test_promotion_is_superseded_when_another_champion_stands(three, registry, expected):
    first, second, third = three
    value = {"first": first, "none": None, "unknown": "f" * 64, "too short": second[:5]}[expected]
    result = promote(registry, NAME, third, by="ann", expected_champion=value)
    assert result == Decision("superseded", third, second)
    assert read_champion(registry, NAME) == second
    assert len(history(registry, NAME)) == 2


def test_unknown_version_lists_what_there_is(three, registry):
    with pytest.raises(ConfigError, match="names no versions") as refused:
        promote(registry, NAME, "0123456789", by="ann")
    listed = ", ".join(sorted(version[:12] for version in three))
    assert str(refused.value).endswith(f"Expected the beginning of exactly one of: {listed}.")


def test_rollbacks_go_back_through_the_champions_until_none_is_left(three, registry):
    first, second, third = three
    promote(registry, NAME, third, by="ann")
    assert rollback(registry, NAME, by="bob") == Decision("rolled_back", second, third)
    assert rollback(registry, NAME, by="bob") == Decision("rolled_back", first, second)
    with pytest.raises(ConfigError, match=r"its champion is \w{12}, and no earlier one is left"):
        rollback(registry, NAME, by="bob")
    assert read_champion(registry, NAME) == first
    line = history(registry, NAME)[-1]
    assert (line["action"], line["version"], line["previous"]) == ("rollback", first, second)
    assert third not in (line["version"], line["previous"])


def test_a_rollback_says_why_even_where_that_is_no_text(three, registry):
    done = rollback(registry, NAME, by="bob", reason="rude \udcff")  # a byte of another encoding
    assert done.outcome == "rolled_back"
    line = history(registry, NAME)[-1]
    assert (line["by"], line["reason"]) == ("bob", "rude ?")


def test_a_rollback_to_a_named_version_is_a_step_that_a_rollback_takes_back(three, registry):
    first, second, third = three
    promote(registry, NAME, third, by="ann")
    rollback(registry, NAME, to=second, by="ann")
    for version in (third, second, first):
        assert rollback(registry, NAME, by="ann").version == version
    with pytest.raises(ConfigError, match="no version to go back to"):
        rollback(registry, NAME, by="ann")


def test_a_promotion_after_rollbacks_goes_back_to_the_version_that_it_replaced(three, registry):
    first, _, third = three
    rollback(registry, NAME, by="ann")
    promote(registry, NAME, third, by="ann")
    assert rollback(registry, NAME, by="ann").version == first


def test_rollback_to_any_registered_version_by_prefix(three, registry):
    first, second, third = three
    assert rollback(registry, NAME, to=third[:6], by="ann") == Decision(
        "rolled_back", third, second
    )
    assert rollback(registry, NAME, to=first, by="ann").version == first


def test_rollback_to_the_champion_changes_nothing(three, registry):
    result = rollback(registry, NAME, to=three[1], by="ann")
    assert result == Decision("already_champion", three[1], three[1])
    assert len(history(registry, NAME)) == 2


def test_ambiguous_prefix_is_refused(three, registry):
    twin = three[0][:6] + "0" * 58
    (registry / NAME / "versions" / twin).mkdir()
    with pytest.raises(ConfigError, match="names 2 versions"):
        rollback(registry, NAME, to=three[0][:6], by="ann")


def test_rollback_with_nothing_to_go_back_to_is_refused(add, registry):
    version = add(1)
    for champion in ("none", version[:12]):
        with pytest.raises(ConfigError, match=f"its champion is {champion}"):
            rollback(registry, NAME, by="ann")
        promote(registry, NAME, version, by="ann")


def test_automation_cannot_bring_back_what_a_person_rolled_back(three, registry):
    first, second, _ = three
    rollback(registry, NAME, by="ann")
    result = promote(
        registry, NAME, second, by="reconcile", expected_champion=first, automatic=True
    )
    assert result == Decision("barred", second, first)
    assert read_champion(registry, NAME) == first


def test_bar_outlives_later_promotions_of_other_versions(three, registry):
    _, second, third = three
    rollback(registry, NAME, by="ann")
    promote(registry, NAME, third, by="flow", automatic=True)
    assert promote(registry, NAME, second, by="flow", automatic=True).outcome == "barred"


def test_person_who_promotes_by_name_lifts_the_bar(three, registry):
    _, second, third = three
    rollback(registry, NAME, by="ann")
    assert promote(registry, NAME, second, by="ann").outcome == "promoted"
    promote(registry, NAME, third, by="ann")
    assert promote(registry, NAME, second, by="flow", automatic=True).outcome == "promoted"


@pytest.mark.parametrize("steps", [(None, 2), (0, 2), (0, None), (None, None, 2)])
def test_who_goes_back_to_what_a_rollback_left_undoes_it_and_bars_nothing(three, registry, steps):
    promote(registry, NAME, three[2], by="ann")
    for step in steps:
        rollback(registry, NAME, to=None if step is None else three[step], by="ann")
    ledger = read_ledger(registry / NAME)
    assert (ledger.champion, ledger.recent_champions(2)[-1]) == (three[2], three[2])
    barred = {three[1]} if steps == (None, None, 2) else set()  # which the second rollback left
    assert ledger.barred_versions().keys() == barred


def test_who_goes_back_to_what_a_rollback_left_bars_what_was_promoted_since(three, registry):
    rollback(registry, NAME, by="ann")
    promote(registry, NAME, three[2], by="flow", automatic=True)
    rollback(registry, NAME, to=three[1], by="ann")
    assert read_ledger(registry / NAME).barred_versions().keys() == {three[2]}
    rollback(registry, NAME, by="ann")  # to the third, and leaves the second once more
    assert read_ledger(registry / NAME).barred_versions().keys() == {three[1]}


def test_a_rollback_to_a_version_that_was_never_left_bars_the_one_that_it_leaves(three, registry):
    promote(registry, NAME, three[2], by="ann")
    rollback(registry, NAME, by="ann")
    rollback(registry, NAME, to=three[0], by="ann")
    assert read_ledger(registry / NAME).barred_versions().keys() == {*three[1:]}


@pytest.mark.parametrize(
    "target", ["/etc", "../rivers", "versions/../..", "versions", "versions/{}/", "versions/abc"]
)
def test_link_that_leads_anywhere_but_to_a_version_is_damage(three, registry, target):
    link = registry / NAME / "champion"
    link.unlink()
    link.symlink_to(target.format(three[0]))
    for call in (
        lambda: read_champion(registry, NAME),
        lambda: promote(registry, NAME, three[2], by="ann"),
        lambda: rollback(registry, NAME, by="ann"),
    ):
        with pytest.raises(DamagedError, match="champion points to"):
            call()
    assert [f.file for f in audit(registry, NAME).findings] == [link]


def test_files_read_through_the_link_can_be_of_two_versions_and_through_its_target_not(
    three, registry
):
    link = registry / NAME / "champion"
    resolved = link.resolve()
    read = [json.loads((place / "gate.json").read_bytes()) for place in (link, resolved)]
    promote(registry, NAME, three[2], by="ann")
    digests = [read_adapter(place).digest() for place in (link, resolved)]
    assert [gate["trained"]["digest"] for gate in read] == [three[1], three[1]]
    assert digests == [three[2], three[1]]


def test_who_is_recorded_even_when_it_is_no_text(three, registry):
    promote(registry, NAME, three[2], by="ann\udcff\n{}")
    assert history(registry, NAME)[-1]["by"] == "ann?\n{}"
    assert audit(registry, NAME).is_sound


def test_reading_writes_nothing(three, registry, tmp_path: Path):
    before = {path: path.lstat().st_mtime_ns for path in registry.rglob("*")}
    (registry / NAME / ".lock").unlink()
    del before[registry / NAME / ".lock"]
    before[registry / NAME] = (registry / NAME).lstat().st_mtime_ns
    read_champion(registry, NAME)
    history(registry, NAME)
    assert audit(registry, NAME).is_sound
    assert {path: path.lstat().st_mtime_ns for path in registry.rglob("*")} == before
