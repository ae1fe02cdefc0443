"""A version that is judged again: the newest verdict against today's champion decides."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from nested_core.config.sections import RegistrySection
from nested_core.errors import DamagedError, GateRejected
from nested_core.records.judged_run import read_judged_run, read_rejected_run
from nested_core.records.verdict_file import parse_verdict, read_verdict
from nested_core.registry import Decision, check_champion, history, ledger, read_champion
from nested_core.registry.data_store import find_lost_lists
from nested_core.registry.ledger import read_ledger
from nested_core.registry.promotion_policy import (
    promote_by_recorded_policy,
    read_candidate,
    register_by_policy,
)
from nested_core.registry.registration import NewVersion, register_rejection
from nested_core.storage.untrusted_files import write_all
from tests.builders.registering import promote, register, register_and_promote
from tests.core.registry.conftest import MakeRun
from tests.core.registry.states import NAME, last_line, promote_by_policy
from tests.gate_files import judged_files, read_gate, write_gate
from tests.registry_care import audit, collect_garbage

Judge = Callable[..., Path]


def provenance(policy: str, champion: str | None = None) -> dict[str, Any]:
    section = {"path": "x", "name": NAME, "promote": policy}
    return {"config": {"registry": section}, "champion_at_gate": champion}


def section(registry: Path, policy: str) -> RegistrySection:
    return RegistrySection(path=str(registry), name=NAME, promote=policy)  # type: ignore[arg-type]


def files_of(registry: Path, version: str) -> list[Path]:
    return sorted((registry / NAME / "judgements" / version).glob("*"))


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """Give the run of a seed another verdict: against `champion`, with this difference to it."""

    def judge(seed: int, champion: str, difference: float, **changes: Any) -> Path:
        run = tmp_path / f"run-{seed}"
        gate = read_gate(run / "gate.json")
        record = {"version": champion, "loss": 2.0, "examples": 84, "difference": difference}
        record |= {"interval": [difference - 0.1, difference + 0.1], "smallest_visible": 0.1}
        gate |= {"champion": record, "thresholds": {"noise": "paired"}} | changes
        write_gate(run, gate, judged_files(run))
        return run

    return judge


def two_versions(make_run: MakeRun, registry: Path) -> tuple[str, str]:
    """A weak champion, and a better version that was registered before it became champion."""
    weak = register(make_run(1), registry, NAME, provenance("never"))
    better = register(make_run(2), registry, NAME, provenance("never"))
    promote(registry, NAME, weak, by="ann")
    return weak, better


def test_a_version_judged_again_is_promoted_by_its_newest_verdict(
    make_run: MakeRun, judge: Judge, registry: Path
) -> None:
    weak, better = two_versions(make_run, registry)
    refused = promote_by_policy(section(registry, "better"), better, weak)
    assert refused.outcome == "refused"
    run = judge(2, weak, -2.4)
    assert register(run, registry, NAME, provenance("better", weak)) == better
    (file,) = files_of(registry, better)
    line = last_line(registry)
    assert (line["action"], line["version"], line["judgement"]) == ("judged", better, file.stem)
    done = promote_by_policy(section(registry, "better"), better, weak)
    assert done == Decision("promoted", better, weak)
    (file,) = files_of(registry, better)
    assert history(registry, NAME)[-1]["judgement"] == file.stem
    assert hashlib.sha256(file.read_bytes()).hexdigest() == file.stem
    written = json.loads(file.read_bytes())
    assert parse_verdict(written, file) == read_verdict(run / "gate.json")
    assert audit(registry, NAME).is_sound


def test_a_registration_that_is_done_again_after_a_crash_adds_no_verdict(
    make_run: MakeRun, registry: Path
) -> None:
    run, better = make_run(1), section(registry, "always")
    new = NewVersion(read_judged_run(run), provenance("always"))
    for outcome in ("promoted", "already_champion"):
        assert register_by_policy(new, better, None).outcome == outcome
    entries = read_ledger(registry / NAME).entries
    assert [entry.action for entry in entries] == ["registered", "promote"]


def test_a_first_verdict_is_named_by_no_line(make_run: MakeRun, registry: Path) -> None:
    two_versions(make_run, registry)
    assert "judgement" not in history(registry, NAME)[-1]
    assert not (registry / NAME / "judgements").exists()


def test_a_judgement_whose_line_is_being_written_stays_where_the_lock_was_removed(
    make_run: MakeRun, judge: Judge, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weak, better = two_versions(make_run, registry)
    run = judge(2, weak, -2.4)
    others: list[tuple[Thread, bool]] = []

    def write_beside_another(descriptor: int, line: bytes) -> None:
        monkeypatch.setattr(ledger, "write_all", write_all)
        (registry / NAME / ".lock").unlink()
        other = Thread(target=suppressing_damage(lambda: check_champion(registry, NAME)))
        other.start()
        other.join(0.3)
        others.append((other, other.is_alive()))
        write_all(descriptor, line)

    monkeypatch.setattr(ledger, "write_all", write_beside_another)
    suppressing_damage(lambda: register(run, registry, NAME, provenance("better", weak)))()
    ((other, waited),) = others
    other.join()
    assert audit(registry, NAME).findings == ()
    assert len(files_of(registry, better)) == 1
    assert waited


def suppressing_damage(action: Callable[[], object]) -> Callable[[], None]:
    """The action, which may find that something writes without the lock."""

    def act() -> None:
        with suppress(DamagedError):
            action()

    return act


def test_the_policy_of_the_newest_verdict_decides_for_a_late_event(
    make_run: MakeRun, judge: Judge, registry: Path
) -> None:
    weak, better = two_versions(make_run, registry)
    register(judge(2, weak, -2.4), registry, NAME, provenance("better", weak))
    done = promote_by_recorded_policy(registry, NAME, better)
    assert done == Decision("promoted", better, weak)


def test_what_was_judged_against_a_former_champion_does_not_count_now(
    make_run: MakeRun, judge: Judge, registry: Path
) -> None:
    weak, better = two_versions(make_run, registry)
    register(judge(2, weak, -2.4), registry, NAME, provenance("better", weak))
    third = register(make_run(3), registry, NAME, provenance("never"))
    promote(registry, NAME, third, by="ann")
    reason = promote_by_policy(section(registry, "better"), better, third)
    assert reason.outcome == "refused"
    assert "did not evaluate the champion" in reason.sentence
    late = promote_by_recorded_policy(registry, NAME, better)
    assert late.outcome == "superseded"


def test_a_newer_rejection_decides_whatever_champion_it_compared_with(
    make_run: MakeRun, judge: Judge, registry: Path
) -> None:
    weak, better = two_versions(make_run, registry)
    register(judge(2, weak, -2.4), registry, NAME, provenance("better", weak))
    below = [{"code": "task_below", "message": "capitals: 3 of 10 right; its min is 0.9"}]
    run = judge(2, "f" * 64, -2.4, verdict="failed", reasons=below)
    new = NewVersion(read_rejected_run(run), provenance("better", "f" * 64))
    register_rejection(new, registry, NAME)
    assert not read_candidate(registry, NAME, better).verdict.has_passed
    with pytest.raises(GateRejected):
        promote(registry, NAME, better, by="ann")
    assert read_champion(registry, NAME) == weak


def test_a_verdict_against_todays_champion_outlives_a_newer_one_against_another(
    make_run: MakeRun, judge: Judge, registry: Path
) -> None:
    weak, better = two_versions(make_run, registry)
    register(judge(2, weak, -2.4), registry, NAME, provenance("better", weak))
    register(judge(2, "f" * 64, 0.5), registry, NAME, provenance("better", "f" * 64))
    against = read_candidate(registry, NAME, better).verdict.champion
    assert against is not None
    assert against.version == weak


def test_registering_once_more_after_one_judging_records_it_once(make_run, judge, registry) -> None:
    weak, better = two_versions(make_run, registry)
    run = judge(2, weak, -2.4)
    for _ in range(3):
        register(run, registry, NAME, provenance("better", weak))
    assert len(files_of(registry, better)) == 1


def test_a_judgement_that_rejects_stops_a_promotion_by_version(make_run, judge, registry) -> None:
    weak, better = two_versions(make_run, registry)
    run = judge(2, weak, -2.4)
    gate = read_gate(run / "gate.json")
    gate |= {"verdict": "failed", "reasons": [{"code": "task_below", "message": "9 of 10"}]}
    write_gate(run, gate, judged_files(run))
    register_rejection(
        NewVersion(read_rejected_run(run), provenance("better", weak)), registry, NAME
    )
    reason = promote_by_policy(section(registry, "better"), better, weak)
    assert reason.sentence == "the gate, run again, rejected it: task_below"
    with pytest.raises(GateRejected, match="task_below"):
        promote(registry, NAME, better, by="ann")
    assert read_champion(registry, NAME) == weak


def test_a_lost_rejection_is_recorded_anew_when_its_run_is_judged_again(
    make_run: MakeRun, judge: Judge, registry: Path
) -> None:
    weak, better = two_versions(make_run, registry)
    below = [{"code": "task_below", "message": "9 of 10"}]
    run = judge(2, weak, -2.4, verdict="failed", reasons=below)
    new = NewVersion(read_rejected_run(run), provenance("better", weak))
    register_rejection(new, registry, NAME)
    shutil.rmtree(registry / NAME / "judgements" / better)
    (finding,) = audit(registry, NAME).findings
    assert "judge that again by `nested-tune train" in str(finding)
    register_rejection(new, registry, NAME)
    assert audit(registry, NAME).is_sound
    assert not read_candidate(registry, NAME, better).verdict.has_passed


def test_a_rejection_keeps_no_rows_whatever_its_run_was_to_keep(
    make_run: MakeRun, judge: Judge, registry: Path
) -> None:
    weak, better = two_versions(make_run, registry)
    told = {**provenance("better", weak), "config": {"registry": {"keep_data": True}}}
    below = [{"code": "task_below", "message": "9 of 10"}]
    run = judge(2, weak, -2.4, verdict="failed", reasons=below)
    register_rejection(NewVersion(read_rejected_run(run), told), registry, NAME)
    assert find_lost_lists(registry / NAME, [better]) == []
    register(judge(2, weak, -2.4, verdict="passed", reasons=[]), registry, NAME, told)
    assert find_lost_lists(registry / NAME, [better]) == [better]


@pytest.mark.parametrize("is_file_lost", [False, True])
def test_a_version_that_comes_back_keeps_its_later_verdict(
    make_run, judge, registry, tmp_path, is_file_lost
) -> None:
    weak, better = two_versions(make_run, registry)
    passed = shutil.copytree(tmp_path / "run-2", tmp_path / "copy")
    run = judge(2, weak, -2.4)
    gate = read_gate(run / "gate.json")
    gate |= {"verdict": "failed", "reasons": [{"code": "task_below", "message": "9 of 10"}]}
    write_gate(run, gate, judged_files(run))
    new = NewVersion(read_rejected_run(run), provenance("better", weak))
    register_rejection(new, registry, NAME)
    shutil.rmtree(registry / NAME / "versions" / better)
    if is_file_lost:
        shutil.rmtree(registry / NAME / "judgements" / better)
    register(passed, registry, NAME, provenance("better", weak))
    assert audit(registry, NAME).is_sound
    verdict = read_candidate(registry, NAME, better).verdict
    assert verdict.has_passed == is_file_lost  # else the verdict of the run stands for it


def test_a_lost_version_that_is_judged_again_and_passes_is_decided_by_that(
    make_run, judge, registry
) -> None:
    weak, better = two_versions(make_run, registry)
    failed = {"verdict": "failed", "reasons": [{"code": "drift", "message": "Too far."}]}
    run = judge(2, weak, -2.4, **failed)
    register_rejection(
        NewVersion(read_rejected_run(run), provenance("better", weak)), registry, NAME
    )
    shutil.rmtree(registry / NAME / "versions" / better)
    for _ in range(2):  # the second one is a task that is tried again
        run = judge(2, weak, -2.4, verdict="passed", reasons=[])
        register(run, registry, NAME, provenance("better", weak))
        assert audit(registry, NAME).is_sound
        assert read_candidate(registry, NAME, better).verdict.has_passed
    assert len(files_of(registry, better)) == 2
    assert promote(registry, NAME, better, by="ann").outcome == "promoted"


@pytest.mark.parametrize("edit", ["bytes", "other version", "no name", "cut", "removed"])
def test_a_judgement_that_was_edited_is_found_until_the_run_is_registered_again(
    make_run: MakeRun, judge: Judge, registry: Path, edit: str
) -> None:
    weak, better = two_versions(make_run, registry)
    run = judge(2, weak, -2.4)
    register(run, registry, NAME, provenance("better", weak))
    (path,) = files_of(registry, better)
    path.chmod(0o644)
    if edit == "bytes":
        path.write_bytes(path.read_bytes().replace(b"-2.4", b"-9.4"))
    elif edit == "other version":
        path.write_bytes(path.read_bytes().replace(better.encode(), weak.encode()))
    elif edit == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif edit == "removed":
        path.unlink()
    else:
        path.rename(path.with_name("x.json"))
    for refuse in (
        lambda: promote_by_policy(section(registry, "better"), better, weak),
        lambda: promote(registry, NAME, better, by="ann"),
    ):
        with pytest.raises(DamagedError, match=r"nested-tune promote RUN_DIR"):
            refuse()
    (finding,) = audit(registry, NAME).findings
    assert finding.file == path
    register_and_promote(run, registry, NAME, provenance("better", weak), by="ann")  # the advice
    assert audit(registry, NAME).is_sound
    assert read_champion(registry, NAME) == better
    assert [line["action"] for line in history(registry, NAME)][-2:] == ["restored", "promote"]


@pytest.mark.usefixtures("no_time_to_decide")
def test_gc_removes_the_judgements_of_what_it_removes(make_run, judge, registry) -> None:
    weak, better = two_versions(make_run, registry)
    register(judge(2, weak, 0.4), registry, NAME, provenance("better", weak))
    assert collect_garbage(registry, NAME, by="ann", keep=0).collected == (better,)
    assert not files_of(registry, better)
    assert audit(registry, NAME).is_sound
