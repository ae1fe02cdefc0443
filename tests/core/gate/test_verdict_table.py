"""A verdict as a table: each check with its figures, what failed and what passed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nested_core.config.sections import GateSection
from nested_core.errors import GateRejected
from nested_core.gate.verdict_table import CheckRow, list_checks, lost_answers
from nested_core.pipeline import steps
from nested_core.pipeline.publishing import confirm_recorded_verdict
from nested_core.records.answers import read_answers
from nested_core.records.run import Run
from nested_core.records.verdict import Reason
from nested_core.records.verdict_file import read_verdict
from nested_core.report.run_page import read_report
from tests.example import EXAMPLES, Finished, train_example
from tests.runs import finished_run

SUITE = {"file": str(EXAMPLES / "geography" / "held_out.jsonl"), "score": "contains"}


@pytest.fixture(scope="module")
def rejected(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run whose adapter fails one suite and a bound of drift, and passes the rest."""
    tasks = [SUITE | {"name": "hard", "min": 1.0}, SUITE | {"name": "easy", "max_drop": 1.0}]
    done = train_example(tmp_path_factory.mktemp("rejected") / "run", iters=8)
    gate = GateSection.model_validate({"tasks": tasks, "max_kl": 0.001})
    config = done.config.model_copy(update={"gate": gate})
    with pytest.raises(
        GateRejected, match=r"rejected: drift .+; also task_below \(hard\)\. Nothing"
    ):
        steps.judge(config, done.run)
    return done


def test_every_check_is_a_row_and_a_reason_stands_in_its_own(rejected: Finished) -> None:
    rows = {check.name: check for check in list_checks(read_verdict(rejected.run.gate))}
    assert [name for name, check in rows.items() if check.has_failed] == [
        "drift of predictions",
        "answers, hard",
    ]
    assert rows["tensors"].verdict == rows["updates"].verdict == "passed"
    assert rows["loss, valid.jsonl, 10 examples"].verdict == "better"
    assert rows["drift of predictions"].bound == "at most 0.001"
    hard, easy = rows["answers, hard"], rows["answers, easy"]
    assert (hard.before, hard.bound, hard.verdict) == (
        "0 of 15",
        "at least 100%, lose at most 0%",
        "task_below",
    )
    assert (easy.verdict, easy.bound) == ("passed", "lose at most 100%")


def test_questions_that_failed_stand_with_both_answers(rejected: Finished) -> None:
    verdict = read_verdict(rejected.run.gate)
    ((suite, rows),) = lost_answers(verdict, read_answers(rejected.run.answers))
    assert suite == "hard"
    assert len(rows) == 3
    question, expected, before, after = rows[0]
    assert question is not None
    assert "Where to?" in question
    assert expected == "Bratislava"
    assert before is not None
    assert before.startswith("Ask ")
    assert after


def test_an_empty_answer_is_said_to_be_empty(rejected: Finished) -> None:
    answers = [replace(a, answer=" \n") for a in read_answers(rejected.run.answers)]
    ((_, rows),) = lost_answers(read_verdict(rejected.run.gate), answers)
    assert [row[2:] for row in rows] == [("(empty)", "(empty)")] * 3


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
        ("loss_regressed", "loss, valid.jsonl, 12 examples"),
    ],
)
def test_each_reason_is_in_a_row(tmp_path: Path, code: str, row: str) -> None:
    run = finished_run(tmp_path / "run", reasons=[Reason(code, "why")])  # type: ignore[arg-type]
    failed: list[CheckRow] = [c for c in list_checks(read_verdict(run.gate)) if c.has_failed]
    assert [(check.name, check.verdict) for check in failed] == [(row, code)]
    assert failed[0].cells[-1] == f"failed: {code}"
    page = read_report(run.path).to_html()
    assert f'<span class="bad">failed: {code}</span>' in page
