"""A verdict as a table: each check with its figures, what failed and what passed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nested_core.config.sections import GateSection
from nested_core.errors import GateRejected
from nested_core.pipeline import steps
from nested_core.pipeline.publishing import confirm_recorded_verdict
from nested_core.records.answers import read_answers
from nested_core.records.run_status import Run
from nested_core.records.verdict import CheckRow, Reason
from nested_core.records.verdict_file import read_verdict
from nested_core.records.verdict_table import list_checks, lost_answers, tier_table
from nested_core.report.run_report import read_report
from nested_core.text.document import Cell
from tests import runs
from tests.core.report.verdicts import CHAMPION, SUITE, make_verdict
from tests.example import EXAMPLES, Finished, train_example
from tests.runs import finished_run

DRIFT = "KL divergence from the initial adapter"
QUESTIONS = {"file": str(EXAMPLES / "geography" / "held_out.jsonl"), "score": "contains"}


@pytest.fixture(scope="module")
def rejected(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run whose adapter fails one suite and a bound of drift, and passes the rest."""
    tasks = [
        QUESTIONS | {"name": "hard", "min": 1.0},
        QUESTIONS | {"name": "easy", "max_drop": 1.0},
    ]
    done = train_example(tmp_path_factory.mktemp("rejected") / "run", iters=8)
    gate = GateSection.model_validate({"tasks": tasks, "max_kl": 0.001})
    config = done.config.model_copy(update={"gate": gate})
    with pytest.raises(
        GateRejected, match=r"Rejected: worse \(drift: .+; also task_below \(hard\)\. Nothing"
    ):
        steps.judge(config, done.run)
    return done


@pytest.mark.parametrize("value", [None, "x", True, -1, 1e308, float("inf"), [1], {"name": 2}])
@pytest.mark.parametrize("key", ["max_harmed_share", "max_kl", "tasks", "max_val_loss_increase"])
def test_a_bound_of_another_kind_in_gate_json_ends_no_page(rejected, key, value) -> None:
    """What `promote` refuses is shown before: a verdict that was edited by hand has a page too."""
    verdict = read_verdict(rejected.run.gate)
    edited = replace(verdict, thresholds=(verdict.thresholds or {}) | {key: value})
    assert len(list_checks(edited)) == len(list_checks(verdict))
    assert edited._repr_html_().startswith("<div")


def test_every_check_is_a_row_and_a_reason_stands_in_its_own(rejected: Finished) -> None:
    rows = {check.name: check for check in list_checks(read_verdict(rejected.run.gate))}
    assert [name for name, check in rows.items() if check.has_failed] == [DRIFT, "answers, hard"]
    assert rows["tensors"].verdict == rows["updates"].verdict == "passed"
    assert rows["validation loss, valid.jsonl, 10 examples"].verdict == "better"
    assert rows[DRIFT].bound == "at most 0.001"
    hard, easy = rows["answers, hard"], rows["answers, easy"]
    assert (hard.before, hard.bound, hard.verdict) == (
        "0 of 15",
        "at least 100%, lose at most 0%",
        "task_below",
    )
    word = "no better than one fixed answer (1)"
    assert (easy.verdict, easy.bound) == (word, "lose at most 100%")


def test_questions_that_failed_stand_with_both_answers(rejected: Finished) -> None:
    verdict = read_verdict(rejected.run.gate)
    (table,) = lost_answers(verdict, read_answers(rejected.run.answers))
    assert table.caption.startswith("hard: ")
    assert len(table.rows) == 3
    question, expected, before, after = map(str, table.rows[0])
    assert "Where to?" in question
    assert expected == "Bratislava"
    assert before.startswith("Ask ")
    assert after


def test_an_empty_answer_is_said_to_be_empty(rejected: Finished) -> None:
    answers = [replace(a, answer=" \n") for a in read_answers(rejected.run.answers)]
    (table,) = lost_answers(read_verdict(rejected.run.gate), answers)
    assert [row[2:] for row in table.rows] == [("(empty)", "(empty)")] * 3


def test_reasons_are_named_with_their_suites(rejected: Finished) -> None:
    assert Run(rejected.run).to_json()["reasons"] == ["drift", "task_below (hard)"]
    with pytest.raises(GateRejected, match=r"rejected this adapter: drift, task_below \(hard\) "):
        confirm_recorded_verdict(rejected.config, rejected.run)


def test_the_page_has_the_table(rejected: Finished) -> None:
    page = read_report(rejected.run.path).to_html()
    assert "What was checked" in page
    assert "at least 100%, lose at most 0%" in page


@pytest.mark.parametrize(
    ("code", "row"),
    [
        ("unchanged", "tensors"),
        ("non_finite", "tensors"),
        ("tier_unchanged", "tensors that updates moved"),
        ("loss_regressed", "validation loss, valid.jsonl, 12 examples"),
    ],
)
def test_each_reason_is_in_a_row(tmp_path: Path, code: str, row: str) -> None:
    run = finished_run(tmp_path / "run", reasons=[Reason(code, "why")])
    failed: list[CheckRow] = [c for c in list_checks(read_verdict(run.gate)) if c.has_failed]
    assert [(check.name, check.verdict) for check in failed] == [(row, code)]
    assert failed[0].cells[-1] == Cell(f"failed: {code}", "bad")


def test_a_figure_that_is_there_has_its_row_and_one_that_is_not_has_none() -> None:
    drift = {"kl_initial": 0.5, "kl_base": 0.75, "tokens": 840}
    suite = SUITE | {"parent": 0.2, "champion": 1.0}
    rival = {"version": "c4a3" * 16, "not_compared": "it is gone"}
    verdict = make_verdict(drift=drift, tasks=[suite], champion=rival, reference=CHAMPION)
    rows = {check.name: check.cells[1:] for check in list_checks(verdict)}
    assert rows == {
        "tensors": (None, "0 of 0 changed", None, "finite, with an effect", "passed"),
        "champion c4a3c4a3c4a3, 0 examples": (*[None] * 4, "not compared: it is gone"),
        "reference c4a3c4a3c4a3 vs this run, 0 examples": (
            *("1.191", "0.021", "-1.17 (-1.2 to -1.1)"),
            *(None, "better"),
        ),
        DRIFT: (None, "0.5", None, "none set (0: no prediction moved)", None),
        "KL divergence from the base": (None, "0.75", None, None, None),
        "answers, capitals (champion 15)": (
            *("3 of 15", "14 of 15", "+0.9333 (+0.8 to +1)"),
            *(None, "passed"),
        ),
    }


def test_the_tiers_have_what_was_due_and_what_moved() -> None:
    table = tier_table(runs.make_verdict(None))
    assert table.rows[1] == ("tier 1", "every 2", "6 of 6", 4, 4, 0, "0.781")
