"""The names of states: each reason of the gate has one."""

from __future__ import annotations

from typing import get_args

from nested_core.records.verdict import OUTCOME_BY_CODE, Code


def test_every_reason_of_the_gate_has_a_name_that_tells_what_was_wrong() -> None:
    assert set(OUTCOME_BY_CODE) == set(get_args(Code))
    named = {outcome.removeprefix("Rejected: ") for outcome in OUTCOME_BY_CODE.values()}
    assert named == {"unchanged", "unsound", "worse", "harmed", "answers"}
