"""A person's word on a version: what waits for it, a yes that promotes, a no that is remembered."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import pytest

from nested_core.records.judged_run import read_rejected_run
from nested_core.registry import Decision, history, promotion_outcome, read_champion
from nested_core.registry.ledger import read_ledger
from nested_core.registry.policy import set_policy
from nested_core.registry.promotion_policy import (
    promote_by_recorded_policy,
    promote_missed_versions,
)
from nested_core.registry.registration import NewVersion, register_rejection
from nested_core.rooms.approval.answers import (
    approve,
    decline,
    find_decline,
    find_refusal_of_question,
)
from tests.builders.registering import promote, register
from tests.core.registry.conftest import Judged, MakeRun
from tests.core.registry.states import (
    NAME,
    clock_at,
    collected,
    missed,
    promote_by_policy,
    section,
    set_keys,
)
from tests.gate_files import judged_files, read_gate, write_gate
from tests.registry_care import audit


class TestADecline:
    """A "no" is remembered by data and settings, not by the version alone."""

    MADE_OF: ClassVar = {"dataset_digest": "d1", "settings_digest": "s1"}

    def register(self, registry, make_run, seed, **made_of):
        section = {"path": "x", "name": NAME, "promote": "approve"}
        recorded = {"config": {"registry": section}} | made_of
        return register(make_run(seed), registry, NAME, recorded)

    @pytest.mark.parametrize(
        ("changes", "is_asked"),
        [({}, False), ({"dataset_digest": "d2"}, True), ({"settings_digest": "s2"}, True)]
        + [({"dataset_digest": None, "settings_digest": None}, True)],
    )
    def test_another_version_is_asked_about_once_data_or_settings_changed(
        self, registry, make_run, changes, is_asked
    ):
        first = self.register(registry, make_run, 1, **self.MADE_OF)
        decline(registry, NAME, first, by="bob", reason="too curt")
        second = self.register(registry, make_run, 2, **self.MADE_OF | changes)
        said = promote_by_recorded_policy(registry, NAME, second).sentence
        assert said.startswith("waiting for approval" if is_asked else "declined already")
        if not is_asked:
            day = f"{datetime.now(UTC):%d %b %Y}"
            assert f"declined already ({first[:12]}), on {day} by bob: too curt. Nobody" in said

    def test_it_is_forgotten_once_a_person_made_that_version_champion(self, registry, make_run):
        first = self.register(registry, make_run, 1, **self.MADE_OF)
        decline(registry, NAME, first, by="bob")
        decline(registry, NAME, first, by="ann")
        assert [line["by"] for line in history(registry, NAME)] == ["bob"]
        promote(registry, NAME, first, by="ann")
        assert find_decline(read_ledger(registry / NAME), first, "d1", "s1") is None
        second = self.register(registry, make_run, 2, **self.MADE_OF)
        said = promote_by_recorded_policy(registry, NAME, second).sentence
        assert said.startswith("waiting for approval")


@pytest.mark.usefixtures("no_time_to_decide")
@pytest.mark.parametrize(
    ("days", "mode", "is_declined", "is_kept"),
    [(6, "approve", False, True), (8, "approve", False, False), (6, "better", False, False)]
    + [(6, "approve", True, False)],
)
def test_one_that_waits_for_approval_is_kept_as_long_as_the_question(
    registry, make_run, monkeypatch, days, mode, is_declined, is_kept
):
    section = {"path": "x", "name": NAME, "promote": mode}
    version = register(make_run(8), registry, NAME, {"config": {"registry": section}})
    if is_declined:
        decline(registry, NAME, version, by="bob")
    now = datetime.now(UTC) + timedelta(days=days)
    monkeypatch.setattr(promotion_outcome, "datetime", clock_at(now))
    assert (version not in collected(registry, 0)) == is_kept


@pytest.mark.parametrize(("own", "held"), [("approve", "better"), ("better", "approve")])
def test_approve_and_better_together_must_be_better_and_then_asks(
    judged: Judged, registry: Path, own: str, held: str
) -> None:
    champion = judged(1)
    promote(registry, NAME, champion, by="ann")
    set_keys(registry, promote=held)
    worse = judged(2, mode=own, champion=champion, better_by=-0.5)
    assert "is not better" in str(promote_by_policy(section(registry, own), worse, champion))
    better = judged(3, mode=own, champion=champion)
    assert "waiting" in str(promote_by_policy(section(registry, own), better, champion))


def test_loosened_parameters_do_not_get_past_a_policy(judged: Judged, registry: Path) -> None:
    """`promote: always`, a bound of 1000 and no noise, under a policy of approve."""
    champion = judged(1)
    promote(registry, NAME, champion, by="ann")
    set_keys(registry, promote="approve", max_val_loss_increase=0.02)
    version = judged(2, champion=champion, noise="none", max_val_loss_increase=1000.0)
    decided = (
        promote_by_policy(section(registry, "always"), version, champion),
        promote_by_recorded_policy(registry, NAME, version),
        promote_missed_versions(registry, NAME)[version],
    )
    for told in map(str, decided):
        assert "looser thresholds than the policy of capitals (gate.noise, gate.max_val" in told
    assert "looser thresholds" in str(find_refusal_of_question(registry, NAME, version))
    done = approve(registry, NAME, version, by="x", expected_champion=champion)
    assert "looser thresholds" in str(done)
    assert read_champion(registry, NAME) == champion


def test_a_name_may_have_a_policy_before_its_first_version(judged: Judged, registry: Path) -> None:
    set_keys(registry, promote="approve")
    assert audit(registry, NAME).is_sound
    version = judged(1)
    assert "waiting" in str(promote_by_recorded_policy(registry, NAME, version))
    assert approve(registry, NAME, version, by="x", expected_champion=None) == Decision(
        "promoted", version, None
    )
    assert audit(registry, NAME).is_sound


@pytest.mark.parametrize("mode", ["approve", "better"])
def test_what_waits_is_left_by_reconcile(judged: Judged, registry: Path, mode: str) -> None:
    set_policy(registry, NAME, by="ann", changes={"promote": "approve"})
    version = judged(1, mode=mode)
    assert missed(registry)[version].startswith(f"waiting for approval of {version[:12]}: ")
    assert read_champion(registry, NAME) is None


def test_a_yes_promotes_nothing_that_the_gate_rejected_meanwhile(
    make_run: MakeRun, registry: Path
) -> None:
    recorded = {"config": {"registry": {"path": "x", "name": NAME, "promote": "approve"}}}
    run = make_run(1)
    version = register(run, registry, NAME, recorded)
    assert find_refusal_of_question(registry, NAME, version) is None
    below = [{"code": "task_below", "message": "capitals: 3 of 10 right; its min is 0.9"}]
    gate = read_gate(run / "gate.json") | {"verdict": "failed", "reasons": below}
    write_gate(run, gate, judged_files(run))
    register_rejection(NewVersion(read_rejected_run(run), recorded), registry, NAME)
    done = approve(registry, NAME, version, by="ann", expected_champion=None)
    assert done.sentence == "the gate, run again, rejected it: task_below"
    assert read_champion(registry, NAME) is None


def test_a_policy_that_is_set_between_the_question_and_the_answer_is_obeyed(
    judged: Judged, registry: Path
) -> None:
    version = judged(1, mode="approve")
    assert find_refusal_of_question(registry, NAME, version) is None
    set_keys(registry, promote="never")
    done = approve(registry, NAME, version, by="ann", expected_champion=None)
    assert done.sentence == f"the policy of {NAME} is never"
    assert read_champion(registry, NAME) is None
