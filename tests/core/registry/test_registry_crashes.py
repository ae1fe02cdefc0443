"""A kill or an I/O error at every call to the operating system leaves a registry that is whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nested_core.errors import ConfigError
from nested_core.pipeline.continual import champion_or_none
from nested_core.registry import (
    audit,
    check_champion,
    history,
    list_versions,
    promote,
    read_champion,
    register,
    rollback,
)
from nested_core.storage.adapter import read_adapter
from tests.core.registry.faults import Action, copies, failed_at, killed_at, number_of
from tests.core.registry.states import NAME, assert_old_or_new_and_whole, assert_settled
from tests.left_out import slow_except

# The children of these forks only touch files; that the parent has threads does not matter.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


INTERRUPTED = "is interrupted at every call to the operating system, and mended after each"
interruptions = pytest.mark.parametrize(
    "interrupted", slow_except([killed_at, failed_at], killed_at, reason=INTERRUPTED)
)


@pytest.fixture(autouse=True)
def _disk_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it has written: fsync is counted here, not waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def actions(three, registry) -> dict[str, tuple[Action, str]]:
    """Each change of the champion, with the version that it leads to."""
    first, _, third = three
    return {
        "promote": (lambda place: promote(place, NAME, third, by="ann"), third),
        "rollback": (lambda place: rollback(place, NAME, by="ann"), first),
    }


@pytest.mark.claim("A registry has one champion, and its history cannot be edited unseen")
@interruptions
@pytest.mark.parametrize(
    "kind", slow_except(["promote", "rollback"], "promote", reason=INTERRUPTED)
)
@pytest.mark.parametrize("every", slow_except([1, 3], 3, reason=INTERRUPTED))
def test_crash_at_any_call_leaves_the_old_or_the_new_champion_and_the_next_change_mends(
    three, registry, actions, interrupted, kind, every
):
    first, old, third = three
    action, new = actions[kind]
    champions = set()
    for number, copy in copies(registry, every):
        if not interrupted(number, action, copy):
            break
        assert_old_or_new_and_whole(copy, old, new)
        champions.add(read_champion(copy, NAME))
        before = check_champion(copy, NAME)  # a writer, which finishes
        assert_settled(copy)
        assert before in (old, new)
        next_version = third if new == first else first
        result = promote(copy, NAME, next_version, by="bob", expected_champion=before)
        assert (result.outcome, result.previous) == ("promoted", before)
        assert_settled(copy)
        assert rollback(copy, NAME, by="bob").version == before
        assert_settled(copy)
    assert number > 15
    assert champions == {old, new}


@pytest.mark.slow(INTERRUPTED)
@interruptions
def test_crash_in_the_very_first_promotion_leaves_no_champion_or_the_first(
    add, registry, interrupted
):
    version = add(1)
    for number, copy in copies(registry):
        if not interrupted(number, lambda place: promote(place, NAME, version, by="a"), copy):
            break
        assert_old_or_new_and_whole(copy, None, version)
        promote(copy, NAME, version, by="bob")
        assert read_champion(copy, NAME) == version
        assert_settled(copy)
    assert number > 15


@pytest.mark.parametrize("crash", ["write", "swap"])
@pytest.mark.parametrize("names_its_version", [False, True])
def test_a_rollback_that_was_cut_short_changes_nothing_in_what_the_next_goes_to(
    three, registry, crash, names_its_version
):
    first, second, third = three
    promote(registry, NAME, third, by="ann")

    def action(place: Path) -> object:
        return rollback(place, NAME, to=first if names_its_version else None, by="ann")

    assert killed_at(number_of(crash, action, registry), action, registry)
    assert read_champion(registry, NAME) == third
    is_made = crash == "swap"  # its line is whole: the next finishes it, and goes on from there
    left = [second, first]
    if is_made:
        left = [third, second, first] if names_its_version else [first]
    assert [rollback(registry, NAME, by="bob").version for _ in left] == left
    assert_settled(registry)
    with pytest.raises(ConfigError, match="no version to go back to"):
        rollback(registry, NAME, by="bob")


@pytest.mark.reliability
@pytest.mark.parametrize("interrupted", [killed_at, failed_at])
@pytest.mark.parametrize("first_crash", ["write", "swap"])
def test_crash_while_mending_a_crash_is_mended_by_the_next(
    three, registry, actions, interrupted, first_crash
):
    first, old, third = three
    action, _ = actions["promote"]
    assert killed_at(number_of(first_crash, action, registry), action, registry)
    for number, copy in copies(registry):
        if not interrupted(number, lambda place: rollback(place, NAME, by="ann"), copy):
            break
        assert read_champion(copy, NAME) in three
        assert audit(copy, NAME).findings == ()
        before = check_champion(copy, NAME)
        assert_settled(copy)
        is_there = before == third
        assert promote(copy, NAME, first if is_there else third, by="bob").previous == before
        assert_settled(copy)
        assert {line["action"] for line in history(copy, NAME)} <= {
            *("registered", "promote", "rollback")
        }
    assert number > 15


@pytest.mark.slow(INTERRUPTED)
@interruptions
def test_crash_at_any_call_of_register_leaves_no_version_or_a_whole_one(
    add, registry, make_run, interrupted
):
    champion = add(1)
    promote(registry, NAME, champion, by="ann")
    run = make_run(2)
    digest = read_adapter(run / "adapter").digest()
    for number, copy in copies(registry):
        if not interrupted(number, lambda place: register(run, place, NAME, {}), copy):
            break
        assert set(list_versions(copy, NAME)) - {digest} == {champion}
        assert audit(copy, NAME).is_sound
        assert register(run, copy, NAME, {}) == digest
        assert promote(copy, NAME, digest, by="bob").outcome == "promoted"
        assert_settled(copy)
    assert number > 15


@pytest.mark.slow(INTERRUPTED)
@interruptions
def test_crash_at_any_call_of_the_very_first_register_keeps_no_later_run_from_the_name(
    registry, make_run, interrupted
):
    """A run asks for the champion before it registers: half a name must not be an unknown one."""
    run = make_run(1)
    registry.mkdir()
    for number, copy in copies(registry):
        if not interrupted(number, lambda place: register(run, place, NAME, {}), copy):
            break
        assert champion_or_none(copy, NAME) is None
        register(run, copy, NAME, {})
        assert audit(copy, NAME).is_sound
    assert number > 15


def test_change_cut_short_is_reported_by_audit_as_unfinished_and_not_as_damage(
    three, registry, actions
):
    action, new = actions["promote"]
    assert killed_at(number_of("swap", action, registry), action, registry)
    report = audit(registry, NAME)
    assert report.is_sound
    assert (report.champion, report.unfinished) == (three[1], new)
    assert history(registry, NAME)[-1]["unfinished"] is True
