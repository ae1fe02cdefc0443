"""A verdict in words: one spelling of an outcome, of a loss and of the champion's."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from nested_core.records.outcome_names import Outcome
from nested_core.records.verdict import OUTCOME_BY_CODE, AncestorLoss, Code
from tests.core.report.verdicts import CHAMPION, LOSSES, SUITE, make_verdict

LOSS = "validation loss 3.142 -> 0.02135 (valid.jsonl, 84 examples, step 80)"
RIVAL = "champion c4a3c4a3c4a3 1.191, difference -1.17 (-1.2 to -1.1), better"


def reason(code: str, message: str = "why", suite: str | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "tensors": [], "suite": suite}


def test_every_reason_of_the_gate_has_an_outcome_that_tells_what_was_wrong() -> None:
    assert set(OUTCOME_BY_CODE) == set(get_args(Code))
    named = {outcome.removeprefix("Rejected: ") for outcome in OUTCOME_BY_CODE.values()}
    assert named == {"unchanged", "unsound", "worse", "harmed", "answers"}
    for code, outcome in OUTCOME_BY_CODE.items():
        verdict = make_verdict(reasons=[reason(code)])
        why = "why" if code == "unchanged" else f"{code}: why"  # the outcome says it already
        assert verdict.summary() == f"{outcome} ({why})"
    assert make_verdict().outcome == Outcome.VERIFIED


def test_a_rejection_names_its_suites_and_the_further_reasons() -> None:
    reasons = [reason("task_below", "2 of 15", "hard"), reason("drift"), reason("forgetting")]
    assert make_verdict(reasons=reasons).summary() == (
        "Rejected: answers (task_below (hard): 2 of 15); also drift, forgetting"
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "no held-out loss"),
        ({"validation": LOSSES}, LOSS),
        ({"validation": LOSSES, "champion": CHAMPION}, f"{LOSS}; {RIVAL}"),
        (
            {"validation": LOSSES | {"examples": 0}},
            "validation loss not measured: all held-out examples were trained on",
        ),
        (
            {"validation": LOSSES | {"file": "/a/exam.jsonl", "conclusion": "no_worse"}},
            "held-out loss 3.142 -> 0.02135 (exam.jsonl, 84 examples, step 80)",
        ),
        (
            {"champion": {"version": "c4a3" * 16, "not_compared": "it is gone"}},
            "no held-out loss; champion c4a3c4a3c4a3 not compared: it is gone",
        ),
        (
            {"samples": {"asked": 3, "judged": 3, "broken": 3, "ways": {"empty": 3}}},
            "no held-out loss; 3 of 3 sample answers are broken (3 empty)",
        ),
    ],
)
def test_a_loss_has_one_spelling(fields: dict[str, Any], words: str) -> None:
    assert make_verdict(**fields).describe_losses() == words


def test_the_summary_has_the_loss_in_that_spelling_and_what_speaks_against_it() -> None:
    few = LOSSES | {"examples": 2, "conclusion": "better", "difference": -3.12}
    verdict = make_verdict(validation=few, tasks=[SUITE])
    words = "passed, better; 14 of 15 right"
    assert verdict.describe() == words
    loss = LOSS.replace("84", "2")
    assert verdict.summary().startswith(f"{words}: 0 of 0 tensors changed, {loss}; 2 held-")
    assert (
        "; capitals: 0 of 15 right before, 14 of 15 after (difference +0.933" in verdict.summary()
    )


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([{"candidate": 0.0, "constant": 0.2}], "0 of 15 right (one fixed answer: 3)"),
        ([{"candidate": 0.2, "constant": 0.2}], "3 of 15 right (one fixed answer: 3)"),
        ([{"base": 0.4, "candidate": 0.2, "constant": 0.2}], None),
        (
            [{"base": 0.4, "candidate": 0.4, "constant": 0.2}],
            "6 of 15 right (base: 6, one fixed answer: 3)",
        ),
        ([{"base": 0.4, "candidate": 0.4, "constant": None}], "6 of 15 right (base: 6)"),
        (
            [{}, {"name": "hard", "candidate": 0.0, "constant": 1 / 15}],
            "hard: 0 of 15 right (one fixed answer: 1)",
        ),
    ],
)
def test_answers_that_show_no_learning_stand_in_the_words_and_are_never_green(tasks, words) -> None:
    words = words or "3 of 15 right (base: 6, one fixed answer: 3)"
    losses = LOSSES | {"conclusion": "better", "difference": -3.12, "interval": [-3.2, -3.0]}
    verdict = make_verdict(validation=losses, tasks=[SUITE | task for task in tasks])
    assert verdict.describe() == f"passed, better loss; {words}"
    assert verdict.summary().startswith(f"passed, better loss; {words}: ")
    assert verdict.describe_losses().endswith(words)
    assert verdict.tone == "warn"
    inconclusive = make_verdict(
        validation=losses | {"conclusion": "inconclusive", "margin": 0.1},
        tasks=verdict.to_json()["tasks"],
    )
    assert inconclusive.describe_passed().startswith("passed, inconclusive loss: -3.1 nats/token")
    assert make_verdict(tasks=[SUITE | task for task in tasks]).describe() == f"passed; {words}"


def test_a_better_loss_alone_says_that_nothing_was_asked_and_is_not_green() -> None:
    verdict = make_verdict(validation=LOSSES | {"conclusion": "better", "difference": -3.12})
    assert verdict.describe() == "passed, better loss; no questions asked"
    assert verdict.tone == ""


ALL_RIGHT = {"base": 1.0, "candidate": 1.0}


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([{"constant": 0.2}], "14 of 15 right (one fixed answer: 3)"),
        ([ALL_RIGHT | {"constant": 0.2}], "15 of 15 right (one fixed answer: 3)"),
        (
            [{"constant": 0.2}, {"name": "guard", "base": 0.6, "candidate": 0.6, "constant": 0.2}],
            "capitals: 14 of 15 right (one fixed answer: 3), "
            "guard: 9 of 15 right (base: 9, one fixed answer: 3)",
        ),
        (
            [{"constant": 0.2}, {"name": "guard"} | ALL_RIGHT | {"constant": 1.0}],
            "capitals: 14 of 15 right (one fixed answer: 3), "
            "guard: 15 of 15 right (one fixed answer: 15)",
        ),
    ],
)
def test_answers_above_the_base_and_any_constant_one_are_green_and_in_the_words(
    tasks, words
) -> None:
    losses = LOSSES | {"conclusion": "better", "difference": -3.12, "interval": [-3.2, -3.0]}
    verdict = make_verdict(validation=losses, tasks=[SUITE | task for task in tasks])
    assert verdict.describe() == f"passed, better; {words}"
    assert verdict.tone == "good"


@pytest.mark.parametrize(
    ("counts", "is_unmeasured"),
    [
        ({}, True),
        ({"left_out": 9}, True),
        ({"superseded": 9}, True),
        ({"superseded": 1, "left_out": 9}, True),
        ({"repeated": 1, "left_out": 9}, True),
        ({"repeated": 1, "missing": 9}, False),  # the lost ones may be rows of train
        ({"repeated": 9}, False),
        ({"repeated": 9, "superseded": 1}, False),
    ],
    ids=str,
)
def test_a_version_is_measured_where_newer_data_has_all_that_is_left_of_its_examples(
    counts: dict[str, Any], is_unmeasured: bool
) -> None:
    ancestor = AncestorLoss("0" * 64, not_compared="nothing is left", **counts)
    assert ancestor.is_unmeasured == is_unmeasured
    assert not AncestorLoss("0" * 64, loss=1.0, difference=0.1, **counts).is_unmeasured
