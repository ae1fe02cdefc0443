"""The list of the gate's checks: what stops one, who is said to have, and which bounds each has."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from nested_core.config.sections import GateSection
from nested_core.gate.checks.file_checks import CHECKS_OF_ADAPTERS, CHECKS_OF_FILES
from nested_core.gate.checks.judged import (
    Check,
    Judged,
    begin_verdict,
    log_stopped_checks,
    run_checks,
)
from nested_core.gate.judge import list_checks_with_model
from nested_core.records.verdict import Reason
from nested_core.storage.adapter import read_adapter
from tests.builders.candidates import Candidate
from tests.core.gate.pairs import A, Tensors, codes, trained_tensors, write
from tests.left_out import needs_rooms

# What the losses are measured on, how differences are judged, and what else is recorded.
NO_BOUNDS = {"held_out", "noise", "drift", "general_data", "allow_python_scorers"}


@pytest.fixture
def judged(tmp_path: Path) -> Judged:
    return begin(tmp_path, trained_tensors(), trained_tensors())


def begin(folder: Path, before: Tensors, after: Tensors) -> Judged:
    """Two adapters on disk before any check."""
    initial = read_adapter(write(folder / "initial", before))
    trained = read_adapter(write(folder / "trained", after))
    bounds = GateSection()
    return Judged(initial, trained, begin_verdict(initial, trained, bounds), bounds=bounds)


def test_a_check_is_stopped_by_those_that_it_names_and_by_no_other(judged: Judged) -> None:
    made: list[str] = []

    def finding(name: str, *reasons: Reason) -> Check[Judged]:
        def find(_: Judged) -> tuple[Reason, ...]:
            made.append(name)
            return reasons

        return Check(name, find)

    first = finding("first", Reason("drift", "one"))
    silent = finding("silent")
    stopped = Check("stopped", first.find, stopped_by=(silent, first))
    going_on = Check("going on", finding("going on").find, stopped_by=(silent, stopped))
    last = Check("last", first.find, needs_all=True)
    run_checks(judged, (silent, first, stopped, going_on, last))
    assert made == ["silent", "first", "going on"]
    assert codes(judged.verdict) == ["drift"]
    assert judged.failed_checks == ["first"]
    assert judged.stopped == {"stopped": "first", "last": "first"}


def test_a_check_that_the_bounds_do_not_ask_for_is_neither_made_nor_stopped(judged: Judged) -> None:
    check: Check[Judged] = Check(
        "unasked", lambda _: [Reason("drift", "")], is_asked=lambda bounds: bounds.check_fused
    )
    run_checks(judged, (check,))
    assert judged.verdict.has_passed
    assert judged.stopped == {}
    log_stopped_checks(judged)


def test_what_could_not_be_checked_is_said_with_the_check_that_stopped_it(
    candidate: Candidate, caplog: pytest.LogCaptureFixture
) -> None:
    name = next(iter(read_adapter(candidate.run.adapter).tensors))
    candidate.rewrite(
        change_adapter=lambda tensors: tensors.update({name: tensors[name] * float("nan")})
    )
    with caplog.at_level(logging.INFO, "nested_core.text.stages"):
        verdict = candidate.verdict()
    assert set(codes(verdict)) == {"non_finite"}
    told = caplog.messages[-1]
    assert told.startswith(
        "gate: not checked, because finite tensors failed: change, enough change, finite products, "
        "effect, skipped"
    )
    assert "updates, base, losses, trainer's logits, worse loss" in told
    assert "training loss" in told  # rooms add checks after it
    assert told.endswith("fresh process")


def test_every_check_has_a_name_of_its_own_and_stands_after_those_that_stop_it() -> None:
    checks = (*CHECKS_OF_FILES, *list_checks_with_model())
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    for place, check in enumerate(checks):
        earlier = names[:place]
        assert all(stop.name in earlier for stop in check.stopped_by), check.name
    assert [check for check in CHECKS_OF_FILES if check in CHECKS_OF_ADAPTERS] == list(
        CHECKS_OF_ADAPTERS
    )


@needs_rooms("fused", "preferences", "replay")
def test_every_bound_of_the_gate_belongs_to_one_check_that_judges_by_it() -> None:
    bounds = [
        key for check in (*CHECKS_OF_FILES, *list_checks_with_model()) for key in check.bounds
    ]
    assert sorted(bounds) == sorted(GateSection.model_fields.keys() - NO_BOUNDS)


def test_tensors_that_cannot_be_compared_leave_nothing_to_say_of_their_values(tmp_path) -> None:
    after = trained_tensors()
    after[A] = after[A][:, :2]
    judged = begin(tmp_path, trained_tensors(), after)
    run_checks(judged, CHECKS_OF_ADAPTERS)
    assert codes(judged.verdict) == ["shape_mismatch"]
    assert set(judged.stopped.values()) == {"tensors"}


def test_the_reason_of_a_cause_stands_first(judged: Judged) -> None:
    found: Check[Judged] = Check("found", lambda _: [Reason("no_effect", "nothing moved")])
    cause: Check[Judged] = Check("cause", lambda _: [Reason("non_finite", "")], is_cause=True)
    last: Check[Judged] = Check("last", lambda _: [Reason("drift", "")], stopped_by=(cause,))
    run_checks(judged, (found, cause, last))
    assert codes(judged.verdict) == ["non_finite", "no_effect"]
    assert judged.failed_checks == ["cause", "found"]
    assert judged.stopped == {"last": "cause"}
