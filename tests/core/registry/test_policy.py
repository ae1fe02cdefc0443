"""The policy of a name: of it and a run's sections the stricter counts, whatever route promotes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.registry import Decision, history, ledger, read_champion, rollback
from nested_core.registry.link_and_views import writing_folder
from nested_core.registry.policy import (
    PromotionRule,
    RegistryPolicy,
    apply_policy,
    describe_tightening,
    find_looser_bounds,
    read_policy,
    read_reference,
    set_policy,
    tighten,
)
from nested_core.registry.promotion_policy import (
    promote_by_recorded_policy,
    promote_missed_versions,
)
from tests.builders.registering import promote, register_and_promote
from tests.core.registry.conftest import Judged
from tests.core.registry.states import NAME, promote_by_policy, section, set_keys
from tests.left_out import leave_out_room, needs_rooms
from tests.registry_care import audit, collect_garbage

MODES = (*("never", "better", "always"), pytest.param("approve", marks=needs_rooms("approval")))
SUITE = {"name": "capitals", "file": "/suites/capitals.jsonl", "score": "contains", "min": 0.9}


ROUTES: dict[str, Callable[[Path, str, str | None, str], Decision]] = {
    "fine-tune": lambda registry, version, champion, mode: promote_by_policy(
        section(registry, mode), version, champion
    ),
    "event": lambda registry, version, champion, mode: promote_by_recorded_policy(
        registry, NAME, version
    ),
    "reconcile": lambda registry, version, champion, mode: promote_missed_versions(registry, NAME)[
        version
    ],
}


def judged_by_reference(version: str, high: float) -> dict[str, Any]:
    """A loss of the candidate that is surely lower than the reference's 1, or rises to `high`."""
    figures = {"version": version, "loss": 1.0, "difference": 0.015, "examples": 84}
    word = "no_worse" if high <= 0.02 else "worse"
    figures |= {"interval": [0.001, high + 0.01], "one_sided_high": high, "margin": 0.02}
    return figures | {"conclusion": word, "clusters": 84}


@pytest.mark.parametrize("route", ROUTES)
def test_no_route_promotes_what_is_not_shown_to_be_within_the_margin_of_the_reference(
    judged: Judged, registry: Path, route: str
) -> None:
    first, champion = judged(1), judged(2)
    for version in (first, champion):
        promote(registry, NAME, version, by="ann")
    set_keys(registry, promote="always", reference=first[:8])
    policy = read_policy(registry, NAME)
    assert policy is not None
    assert policy.reference == read_reference(registry, NAME) == first
    for seed, reference, said in (
        (3, None, "the gate did not evaluate the reference"),
        (4, judged_by_reference(champion, 0.019), "the gate did not evaluate the reference"),
        (5, judged_by_reference(first, 0.03), f"may be worse than the reference {first[:12]} "),
        (6, {"version": first, "not_compared": "it does not fit"}, "it does not fit"),
        (7, judged_by_reference(first, 0.019), "promoted"),
    ):
        version = judged(seed, champion=champion, reference=reference)
        done = ROUTES[route](registry, version, champion, "always")
        text = done.sentence
        assert said in text
        if seed == 5:
            assert "one-sided 95 % end +0.03, margin +0.02 nats/token" in text


def test_a_reference_of_nights_is_the_champion_of_so_many_promotions_ago(judged, registry) -> None:
    versions = [judged(seed) for seed in range(1, 6)]
    set_keys(registry, reference="nights:2")
    assert read_reference(registry, NAME) is None
    expected = [versions[0], versions[0], versions[0], versions[1], versions[2]]
    for version, reference in zip(versions, expected, strict=True):
        promote(registry, NAME, version, by="ann")
        assert read_reference(registry, NAME) == reference
    collected = collect_garbage(registry, NAME, by="ann", keep=0).collected
    assert set(collected) == set(versions[:2])
    assert read_reference(registry, NAME) == versions[2]
    rollback(registry, NAME, by="ann")  # leaves 5: 2 promotions ago is still 3
    assert read_reference(registry, NAME) == versions[2]


@pytest.mark.parametrize("route", ROUTES)
def test_a_reference_that_is_not_there_promotes_nothing_but_a_first_version(
    judged: Judged, registry: Path, route: str
) -> None:
    first = judged(1)
    set_keys(registry, promote="always", reference="nights:1")
    assert ROUTES[route](registry, first, None, "always").outcome == "promoted"
    other = judged(2)
    rollback(registry, NAME, to=other, by="ann")  # which was never promoted, and bars the first
    version = judged(3, champion=other)
    told = ROUTES[route](registry, version, other, "always").sentence
    assert told.startswith("the reference is not there (policy reference: nights:1)")


@pytest.mark.parametrize("wanted", ["nights:0", "nights:x", "abcdef", "champion"])
def test_a_reference_that_is_none_is_refused(registry: Path, judged: Judged, wanted: str) -> None:
    judged(1)
    with pytest.raises(ConfigError):
        set_keys(registry, reference=wanted)


def test_always_without_a_reference_is_told(registry: Path) -> None:
    def told(mode: str) -> str:
        own = section(registry, mode).model_dump(mode="json")
        return " ".join(apply_policy(FineTuneConfig.model_validate({"registry": own}))[1])

    what = "nothing limits what the small losses of many promotions add up to"
    assert what in told("always")
    assert what not in told("better")
    set_keys(registry, reference="nights:30")
    assert what not in told("always")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("own", MODES)
@pytest.mark.parametrize("held", MODES)
def test_every_route_needs_what_the_stricter_of_the_two_needs(
    judged: Judged, registry: Path, route: str, own: str, held: str
) -> None:
    """`never` in either stops a better version, `approve` in either asks, else it is champion."""
    champion = judged(1)
    promote(registry, NAME, champion, by="ann")
    set_keys(registry, promote=held)
    version = judged(2, mode=own, champion=champion)
    done = ROUTES[route](registry, version, champion, own)
    text = done.sentence
    if "never" in (own, held):
        assert "is never" in text
    elif "approve" in (own, held):
        assert "waiting for approval" in text
    else:
        assert text == "promoted"
    is_promoted = text == "promoted"
    assert read_champion(registry, NAME) == (version if is_promoted else champion)


def test_a_suite_of_the_policy_has_to_be_asked_as_it_stands_there(judged, registry) -> None:
    set_keys(registry, tasks=[SUITE])
    policy = read_policy(registry, NAME)
    assert policy is not None
    asked = policy.fields()["tasks"]
    for tasks in ([], [asked[0] | {"min": 0.1}], [asked[0] | {"file": "/suites/easy.jsonl"}]):
        thresholds = {"noise": "paired", "tasks": tasks}
        assert find_looser_bounds(policy, thresholds) == ["the eval set capitals"]
    assert find_looser_bounds(policy, {"noise": "paired", "tasks": asked}) == []
    assert find_looser_bounds(policy, None) == ["gate.noise", "the eval set capitals"]
    assert find_looser_bounds(None, None) == []


def test_better_under_a_policy_rests_on_the_interval_whatever_the_run_says(
    judged: Judged, registry: Path
) -> None:
    champion = judged(1)
    promote(registry, NAME, champion, by="ann")
    version = judged(2, mode="better", champion=champion, better_by=0.05, noise="none")
    never = promote_by_policy(section(registry, "never"), version, champion)
    assert never.outcome == "registered"
    set_keys(registry, promote="better")
    told = str(promote_by_policy(section(registry, "better"), version, champion))
    assert "looser thresholds" in told


def test_a_person_who_promotes_is_above_the_policy_and_the_history_says_so(
    judged: Judged, registry: Path
) -> None:
    judged(1)
    set_keys(registry, promote="never")
    why = "the policy is never"
    run = registry.parent / "run-1"
    done = register_and_promote(run, registry, NAME, {}, by="ann", against_policy=why)
    assert (done.outcome, done.against_policy) == ("promoted", why)
    assert history(registry, NAME)[-1]["against_policy"] == "the policy is never"


def test_a_run_is_tightened_and_it_is_said(registry: Path) -> None:
    set_keys(registry, promote="better", max_val_loss_increase=0.02, tasks=[SUITE])
    own = SUITE | {"min": 0.1}
    other = SUITE | {"name": "other"}
    config = FineTuneConfig.model_validate(
        {
            "registry": {"path": str(registry), "name": NAME, "promote": "always"},
            "gate": {"max_val_loss_increase": 1000, "noise": "none", "tasks": [own, other]},
        }
    )
    policy = read_policy(registry, NAME)
    gate = tighten(config, policy).gate
    assert (gate.max_val_loss_increase, gate.noise) == (0.02, "paired")
    assert {task.name: task.min for task in gate.tasks} == {"other": 0.9, "capitals": 0.9}
    told = describe_tightening(config, policy)
    assert told == [
        "the policy of capitals: gate.max_val_loss_increase is 0.02, not 1000",
        "the policy of capitals: gate.noise is paired, not none",
        "the policy of capitals: the eval set capitals is asked, in place of this run's",
        "the policy of capitals: promote: better counts beside this run's always",
    ]
    held = tighten(config, policy)
    assert find_looser_bounds(policy, held.gate.model_dump(mode="json")) == []
    stricter = held.model_copy(
        update={"gate": held.gate.model_copy(update={"max_val_loss_increase": 0.0})}
    )
    assert tighten(stricter, policy).gate.max_val_loss_increase == 0.0
    assert tighten(config, None) is config


def test_a_policy_that_an_earlier_release_wrote_is_read_and_changed(judged, registry) -> None:
    judged(1)
    written = RegistryPolicy(promote="better").fields() | {"canary": "rollback"}
    with writing_folder(registry / NAME) as held:
        held.record("policy", held.champion, "ann", before=None, after=written)
    assert read_policy(registry, NAME) == RegistryPolicy(promote="better")
    changed = set_policy(registry, NAME, by="bob", changes={"max_val_loss_increase": 0.1})
    assert changed == RegistryPolicy(promote="better", max_val_loss_increase=0.1)
    assert audit(registry, NAME).is_sound


def test_a_change_stands_in_the_history_with_who_when_before_and_after(judged, registry) -> None:
    champion = judged(1)
    promote(registry, NAME, champion, by="ann")
    set_keys(registry, promote="better")
    set_policy(registry, NAME, by="bob", changes={"max_val_loss_increase": 0.1})
    first, second = history(registry, NAME)[-2:]
    assert (first["action"], first["by"], first.get("before")) == ("policy", "ann", None)
    assert (second["by"], second["before"]) == ("bob", first["after"])
    after = {"promote": "better", "max_val_loss_increase": 0.1, "tasks": [], "reference": None}
    assert second["after"] == after
    assert (second["version"], second["previous"]) == (champion, champion)
    assert json.loads((registry / NAME / "policy.json").read_bytes()) == second["after"]
    assert audit(registry, NAME).is_sound
    other = judged(2)
    promote(registry, NAME, other, by="ann")
    assert rollback(registry, NAME, by="ann").version == champion


@pytest.mark.parametrize("edit", ["loosened", "removed", "no JSON"])
def test_a_policy_file_that_was_edited_decides_nothing_is_found_and_is_written_anew(
    judged: Judged, registry: Path, edit: str
) -> None:
    champion = judged(1)
    promote(registry, NAME, champion, by="ann")
    set_keys(registry, promote="never")
    path = registry / NAME / "policy.json"
    sound = path.read_bytes()
    if edit == "removed":
        path.unlink()
    else:
        path.write_text("{" if edit == "no JSON" else json.dumps({"promote": "always"}))
    (finding,) = audit(registry, NAME).findings
    assert (finding.file, finding.message) == (path, "does not say what the history says")
    policy = read_policy(registry, NAME)
    assert policy is not None
    assert policy.promote == "never"
    version = judged(2, champion=champion)  # a writer
    assert path.read_bytes() == sound
    decision = promote_by_policy(section(registry, "always"), version, champion)
    assert decision.sentence == "the policy of capitals is never"
    assert audit(registry, NAME).is_sound


@pytest.mark.parametrize(
    "changes",
    [
        {"promote": "sometimes"},
        {"max_val_loss_increase": -1.0},
        {"max_val_loss_increase": float("nan")},
        {"tasks": [{"name": "x"}]},
        {"tasks": [SUITE, SUITE]},
        {"tasks": [SUITE | {"score": "python", "function": "a:b"}]},
        {"other": 1},
    ],
)
def test_what_is_no_policy_is_refused_and_nothing_is_written(judged, registry, changes) -> None:
    judged(1)
    before = sorted(path.name for path in (registry / NAME).iterdir())
    with pytest.raises(ConfigError, match="policy: "):
        set_keys(registry, **changes)
    assert sorted(path.name for path in (registry / NAME).iterdir()) == before


def test_a_policy_that_asks_a_person_needs_the_room(registry, monkeypatch) -> None:
    leave_out_room("approval", monkeypatch)
    with pytest.raises(ConfigError, match="belongs to the room approval, which is not installed"):
        set_keys(registry, promote="approve")
    assert not registry.exists()


def test_rules_join_what_all_of_them_need() -> None:
    assert PromotionRule.of("always", None) == PromotionRule(False, False, False)
    assert PromotionRule.of("approve", RegistryPolicy(promote="better")) == PromotionRule(
        False, True, True
    )
    assert ledger.Ledger().policy() is None
