"""Late and repeated events, and reconcile: no newer champion demoted, nothing brought back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.sections import RegistrySection
from nested_core.errors import ConfigError, DamagedError
from nested_core.records.judged_run import read_judged_run
from nested_core.registry import (
    Decision,
    history,
    ledger,
    list_versions,
    promotion_policy,
    read_champion,
    rollback,
)
from nested_core.registry.policy import set_policy
from nested_core.registry.promotion_policy import (
    compare_losses,
    promote_by_recorded_policy,
    read_candidate,
    register_by_policy,
)
from nested_core.registry.registration import NewVersion
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.core.registry.states import missed, promote_by_policy
from tests.gate_files import judged_files, read_gate, write_gate
from tests.left_out import needs_rooms
from tests.registry_care import collect_garbage

NAME = "capitals"
SECONDS_FOR_A_GC = 0.25  # it takes some milliseconds, and all of this where it has to wait
Add = Callable[..., str]


pytestmark = pytest.mark.usefixtures("no_time_to_decide")


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def judge_against(run: Path, champion: str, difference: float) -> None:
    """Let the verdict of a run say how it compares with a champion."""
    record = {"version": champion, "loss": 1.2, "examples": 10, "difference": difference}
    write_gate(run, read_gate(run / "gate.json") | {"champion": record}, judged_files(run))


@pytest.fixture
def add(tmp_path: Path, registry: Path) -> Add:
    """Register the version of a seed, judged against `champion`, under a policy."""

    def add(
        seed: int,
        champion: str | None = None,
        policy: str | None = "always",
        difference: float = 0.0,
    ) -> str:
        run = write_run(tmp_path / f"run-{seed}", seed)
        if champion is not None:
            judge_against(run, champion, difference)
        section = {"path": "elsewhere", "name": "other", "promote": policy}
        provenance: dict[str, Any] = {"champion_at_gate": champion, "validation_digest": "d1"}
        provenance |= {"config": {"registry": section}} if policy else {}
        return register(run, registry, NAME, provenance)

    return add


def late(registry: Path, version: str) -> Any:
    return promote_by_recorded_policy(registry, NAME, version).sentence


def test_an_event_promotes_by_the_recorded_policy_into_the_registry_it_names(add, registry) -> None:
    version = add(1)
    assert late(registry, version) == "promoted"
    assert history(registry, NAME)[-1]["automatic"] is True


def test_a_repeated_event_changes_nothing(add: Add, registry: Path) -> None:
    version = add(1)
    assert [late(registry, version) for _ in range(3)] == [
        "promoted",
        "already_champion",
        "already_champion",
    ]
    assert len(history(registry, NAME)) == 1


def test_a_late_event_does_not_demote_a_newer_champion(add: Add, registry: Path) -> None:
    first, second = add(1), add(2)
    promote(registry, NAME, second, by="ann")
    assert late(registry, first) == "superseded"
    assert read_champion(registry, NAME) == second


def test_what_a_person_rolled_back_is_not_brought_back(add: Add, registry: Path) -> None:
    first = add(1)
    late(registry, first)
    second = add(2, first)
    late(registry, second)
    rollback(registry, NAME, by="ann")
    assert late(registry, second) == "superseded"
    assert missed(registry) == {}
    assert read_champion(registry, NAME) == first


def test_a_champion_that_left_and_came_back_still_supersedes(add: Add, registry: Path) -> None:
    first = add(1)
    late(registry, first)
    forgotten, second = add(2, first), add(3, first)
    late(registry, second)
    rollback(registry, NAME, by="ann")
    assert late(registry, forgotten) == "superseded"
    assert missed(registry) == {forgotten: "superseded"}
    assert read_champion(registry, NAME) == first


def test_reconcile_promotes_the_newest_that_an_event_got_lost_for(add: Add, registry: Path) -> None:
    first = add(1)
    late(registry, first)
    lost, newer = add(2, first), add(3, first)
    assert missed(registry) == {newer: "promoted", lost: "superseded"}
    before = history(registry, NAME)
    assert missed(registry) == {lost: "superseded"}
    assert history(registry, NAME) == before
    assert read_champion(registry, NAME) == newer


class Clock2001(datetime):
    """A clock that is years behind."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime(2001, 1, 1, tzinfo=UTC)


def test_of_two_that_were_missed_the_later_is_promoted_though_its_clock_was_behind(
    add: Add, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = add(1)
    monkeypatch.setattr(ledger, "datetime", Clock2001)
    newer = add(2)
    assert missed(registry) == {newer: "promoted", older: "superseded"}


def test_reconcile_leaves_what_its_policy_leaves(add: Add, registry: Path) -> None:
    never = add(1, None, "never")
    unknown = add(9, None, None)
    outcomes = missed(registry)
    assert outcomes[never] == "registry.promote is never"
    assert outcomes[unknown] == "its provenance records no policy"
    assert read_champion(registry, NAME) is None


def test_better_is_judged_by_reconcile_too(add: Add, registry: Path, tmp_path: Path) -> None:
    first = add(1)
    late(registry, first)
    worse = add(2, first, "better")
    assert missed(registry) == {
        worse: "validation loss 1.2 is not better by more than 0.005 than the champion's 1.2 "
        "(valid.jsonl, 10 examples)"
    }
    better = write_run(tmp_path / "run-3", 3)
    judge_against(better, first, -0.7)
    section = {"promote": "better", "path": "x", "name": "y"}
    provenance = {"champion_at_gate": first, "validation_digest": "d1"}
    version = register(better, registry, NAME, provenance | {"config": {"registry": section}})
    assert missed(registry)[version] == "promoted"


def test_losses_on_files_of_which_no_digest_is_recorded_are_not_compared(
    registry: Path, tmp_path: Path
) -> None:
    """Two files outside of the data sets may hold different examples."""
    first, second = (
        register(write_run(tmp_path / f"run-{seed}", seed), registry, NAME, {}) for seed in (1, 2)
    )
    candidate = read_candidate(registry, NAME, second)
    assert candidate.loss_after is not None
    assert compare_losses(registry, NAME, candidate, first) is None


def test_an_event_about_an_unknown_version_is_refused(add: Add, registry: Path) -> None:
    add(1)
    with pytest.raises(ConfigError, match="has no version"):
        late(registry, "f" * 64)
    with pytest.raises(ConfigError, match="has no version"):
        late(registry, "../../etc")


@pytest.mark.parametrize(
    "provenance",
    [
        {"champion_at_gate": 1},
        {"config": []},
        {"config": {"registry": "always"}},
        {"config": {"registry": {"promote": "sometimes"}}},
        {"config": {"registry": {"promote": "always", "force": True}}},
    ],
)
def test_a_version_whose_record_has_other_types_is_damage(tmp_path, registry, provenance) -> None:
    version = register(write_run(tmp_path / "run", 1), registry, NAME, provenance)
    with pytest.raises(DamagedError, match="provenance"):
        late(registry, version)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1, "a": 2}', "[" * 100_000])
def test_a_version_whose_provenance_cannot_be_read_is_damage(add, registry, content) -> None:
    version = add(1)
    path = registry / NAME / "versions" / version / "provenance.json"
    path.chmod(0o644)
    path.write_text(content)
    with pytest.raises(DamagedError, match=r"provenance\.json .*Restore "):
        late(registry, version)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_verdict_that_is_no_file_is_damage_and_not_waited_for(add, registry, make) -> None:
    version = add(1)
    path = registry / NAME / "versions" / version / "gate.json"
    path.unlink()
    make(path)
    with pytest.raises(DamagedError, match=r"gate\.json"):
        read_candidate(registry, NAME, version)


def test_a_damaged_version_keeps_reconcile_from_no_other(add: Add, registry: Path) -> None:
    sound, unreadable, changed = add(1), add(2), add(3)
    for version, content in ((unreadable, "{"), (changed, None)):
        path = registry / NAME / "versions" / version / "provenance.json"
        path.chmod(0o644)
        path.write_text(content or path.read_text() + " ")
    outcomes = missed(registry)
    assert outcomes[sound] == "promoted"
    assert outcomes[unreadable].startswith("damaged: ")
    assert outcomes[changed].startswith("damaged: ")
    assert "provenance.json" in outcomes[changed]
    assert read_champion(registry, NAME) == sound


def meanwhile(monkeypatch: pytest.MonkeyPatch, step: str, act: Callable[[], object]) -> None:
    """Another process acts just before the policy takes a step for the first time."""
    taken = getattr(promotion_policy, step)

    def after(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        act()
        return taken(*arguments, **options)

    monkeypatch.setattr(promotion_policy, step, after)


def test_nothing_is_written_between_the_decision_and_the_promotion(
    add: Add, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that somebody sets meanwhile waits for the lock, and counts from then on."""
    version = add(1)
    changes = {"promote": "never"}
    admin = threading.Thread(
        target=set_policy, args=(registry, NAME), kwargs={"by": "admin", "changes": changes}
    )

    def act() -> None:
        admin.start()
        admin.join(SECONDS_FOR_A_GC)

    meanwhile(monkeypatch, "find_refusal", act)
    assert late(registry, version) == "promoted"
    admin.join()
    assert [line["action"] for line in history(registry, NAME)] == ["promote", "policy"]


@needs_rooms("housekeeping")
def test_a_version_is_registered_decided_on_and_promoted_under_one_lock(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = read_judged_run(write_run(tmp_path / "run", 1))
    section = RegistrySection(path=str(registry), name=NAME, promote="always")
    gc = threading.Thread(
        target=collect_garbage, args=(registry, NAME), kwargs={"by": "gc", "keep": 0}
    )

    def act() -> None:
        gc.start()
        gc.join(SECONDS_FOR_A_GC)

    meanwhile(monkeypatch, "choose_candidate", act)
    done = register_by_policy(NewVersion(run, {}), section, None)
    gc.join()
    assert done == Decision("promoted", run.version, None)
    assert read_champion(registry, NAME) == run.version
    assert [line["automatic"] for line in history(registry, NAME)] == [True]


@needs_rooms("housekeeping")
def test_a_version_is_not_collected_while_it_is_read(add, registry, monkeypatch) -> None:
    version = add(1)
    gc = threading.Thread(
        target=collect_garbage, args=(registry, NAME), kwargs={"by": "gc", "keep": 0}
    )

    def act() -> None:
        gc.start()
        gc.join(SECONDS_FOR_A_GC)

    meanwhile(monkeypatch, "read_verdicts", act)
    assert read_candidate(registry, NAME, version).version == version
    gc.join()
    assert list_versions(registry, NAME) == []


def test_a_champion_that_was_replaced_and_collected_meanwhile_supersedes_and_is_no_damage(
    add: Add, registry: Path
) -> None:
    judged_against, *others = (add(seed) for seed in range(3))
    for each in (judged_against, *others):
        promote(registry, NAME, each, by="ann")
    version = add(3, judged_against, difference=-0.7)
    assert collect_garbage(registry, NAME, by="gc", keep=1).collected == (judged_against,)
    section = RegistrySection(path=str(registry), name=NAME, promote="better")
    done = promote_by_policy(section, version, judged_against)
    assert done == Decision("superseded", version, others[-1])


@pytest.mark.parametrize("behind", ["the machine that changed the champion", "that registered"])
def test_a_clock_that_is_behind_changes_nothing_in_what_is_superseded(
    add: Add, registry: Path, monkeypatch: pytest.MonkeyPatch, behind: str
) -> None:
    """Whether the champion changed since a version was registered is told by the history."""
    first, second = add(1), add(2)
    promote(registry, NAME, first, by="ann")

    with monkeypatch.context() as patch:
        if behind == "that registered":
            patch.setattr(ledger, "datetime", Clock2001)
        candidate, other = add(3, first), add(4, first)
    assert late(registry, candidate) == "promoted"
    rollback(registry, NAME, to=first, by="ann")
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "datetime", Clock2001)
        promote(registry, NAME, second, by="ann")
        rollback(registry, NAME, to=first, by="ann")
    assert late(registry, other) == "superseded"
    assert read_champion(registry, NAME) == first


def test_a_promotion_that_an_earlier_release_recorded_is_carried_out(tmp_path, registry) -> None:
    """With the key for servers to be waited for, which is not there any more."""
    section = {"path": "x", "name": "y", "promote": "always", "await_serving": 60.0}
    run = write_run(tmp_path / "run", 1)
    version = register(run, registry, NAME, {"config": {"registry": section}})
    assert promote_by_recorded_policy(registry, NAME, version).outcome == "promoted"
