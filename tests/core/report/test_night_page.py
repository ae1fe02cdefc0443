"""The first page of a run: six lines that tell the night, whatever it came to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nested_core.records.answers import AnsweringRole, AnswerRecord, write_answers
from nested_core.records.dataset import Finding
from nested_core.records.metrics import append_metrics
from nested_core.records.outcome import Outcome
from nested_core.records.run import Run
from nested_core.records.verdict_file import write_verdict
from nested_core.report.night_page import describe_night
from nested_core.storage.run_directory import RunDirectory
from tests.core.report.verdicts import LOSSES, SUITE, make_verdict
from tests.example import example_config
from tests.runs import write_dataset

VERDICT: dict[str, Any] = {
    "validation": LOSSES,
    "champion": {
        "version": "c4a3" * 16,
        "loss": 0.0184123456,
        "difference": 0.0029333,
        "interval": [0.0011, 0.0047],
        "conclusion": "worse",
    },
    "drift": {"kl_initial": 0.4212345, "kl_base": None, "tokens": 840},
    "tasks": [SUITE | {"champion": 1.0}],
}
FINDINGS = [
    Finding("train.jsonl", 1, "warning", "duplicate", "line 1 again"),
    Finding("train.jsonl", 2, "warning", "near_duplicate", "line 2, nearly"),
    Finding("train.jsonl", None, "info", "rows", "1200"),
]


def answer(model: AnsweringRole, line: int, text: str) -> AnswerRecord:
    question = f"Question {line}?"
    return AnswerRecord(
        task="capitals",
        model=model,
        line=line,
        question=question,
        answer=text,
        score=float(text == "Paris"),
        tokens=3,
        empty=False,
        endless=False,
        repeated=False,
        seconds=0.1,
    )


def page_of(folder: Path, outcome: str, message: str, **changes: Any) -> str:
    registry = {"path": "registry", "name": "support-bot"}
    config = example_config(registry=registry, **changes)
    return str(describe_night(config, Run(RunDirectory(folder)), outcome, message))


def facts_of(page: str) -> dict[str, str]:
    lines = [line.removeprefix("- **") for line in page.splitlines() if line.startswith("- **")]
    return {name: fact.replace("\\", "") for name, _, fact in (x.partition("**: ") for x in lines)}


def write_files(folder: Path) -> None:
    write_verdict(folder, make_verdict(**VERDICT), {})
    write_dataset(RunDirectory(folder), FINDINGS, train=1200, valid=84)
    rows = [answer("base", 1, "same"), answer("candidate", 1, "same")]
    rows += [answer("base", 2, "<b>Rome"), answer("candidate", 2, "Paris")]
    write_answers(folder / "answers.jsonl", rows)


def test_six_lines_tell_the_night(tmp_path: Path) -> None:
    write_files(tmp_path)
    page = page_of(tmp_path, "Promoted", "verified ada9ad: promoted")
    facts = facts_of(page)
    assert page.startswith("# support-bot: Promoted")
    assert list(facts) == ["Verdict", "Loss", "Answers", "Data", "Made of", "Run folder"]
    assert facts["Verdict"] == "verified ada9ad: promoted"
    assert facts["Loss"] == (
        "Loss 3.142 before training, 0.02135 after, adapter of step 80 (valid.jsonl, 84 examples). "
        "Champion c4a3c4a3c4a3: loss 0.01841 on the same examples; difference +0.002933, "
        "worse (95 % interval +0.0011 to +0.0047). The predictions moved by 0.4212 nats a token "
        "from those of the adapter that training began from (mean KL divergence, 840 tokens of the "
        "held-out examples)."
    )
    assert facts["Answers"] == (
        "capitals: 0 of 15 right before, 14 of 15 after (difference +0.933, 95 % interval +0.800 "
        "to +1.000), champion 15 of 15"
    )
    assert facts["Data"].endswith(
        "1,200 train, 84 valid examples; 2 warning (duplicate, near_duplicate)"
    )
    assert "from a fresh adapter, 8 iterations, learning rate 0.002" in facts["Made of"]
    assert "seed 0, registry.promote: " in facts["Made of"]
    for digest in ("da7ada7ada7a", "141714171417", "ada9ada9ada9"):
        assert digest in facts["Made of"]


def test_a_night_of_epochs_names_no_iterations(tmp_path: Path) -> None:
    page = page_of(tmp_path, "Promoted", "promoted", training={"epochs": 3})
    assert ", 3 epochs, learning rate" in facts_of(page)["Made of"]


def test_a_night_without_a_registry_has_its_page(tmp_path: Path) -> None:
    write_files(tmp_path)
    page = str(
        describe_night(example_config(), Run(RunDirectory(tmp_path)), "Verified", "verified")
    )
    assert page.startswith("# Fine-tune: Verified")
    assert "from a fresh adapter, 8 iterations" in facts_of(page)["Made of"]


def test_the_command_that_makes_it_again_is_there_to_copy(tmp_path: Path) -> None:
    page = page_of(tmp_path, Outcome.RUNNING, "begun")
    command = "    nested-tune train --run-dir again \\\n"
    assert f"{command}      -c {tmp_path / 'config.yaml'}\n" in f"{page}\n"


def test_answers_that_changed_come_first_and_are_no_markup(tmp_path: Path) -> None:
    write_files(tmp_path)
    answers = page_of(tmp_path, "Promoted", "promoted").partition("Answers before and after")[2]
    lines = [line for line in answers.splitlines() if line and "---" not in line]
    assert lines[0].replace("\\", "") == "Question 2?: score 0 -> 1"
    assert lines[1:3] == ["| before | after |", r"| \<b\>Rome | Paris |"]
    assert lines[3].replace("\\", "").startswith("Question 1?: score ")
    assert lines[-1] == "| same | same |"


def test_a_long_answer_goes_on_in_the_next_row_so_that_both_sides_fit_a_window(
    tmp_path: Path,
) -> None:
    write_files(tmp_path)
    long = " ".join(["word"] * 20)
    write_answers(
        tmp_path / "answers.jsonl", [answer("base", 1, long), answer("candidate", 1, "Paris")]
    )
    page = page_of(tmp_path, "Promoted", "promoted")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| word")]
    assert [len(row) for row in rows] == [2, 2, 2]
    assert all(len(row[0]) <= 42 for row in rows)


def add_samples(folder: Path, steps: Iterable[int], prompts: int = 1) -> None:
    for step in steps:
        samples = [
            {"prompt": f"Where to {number}?", "answer": f"after {step}", "tokens": 1}
            for number in range(prompts)
        ]
        append_metrics(folder / "metrics.jsonl", {"step": step, "samples": samples})


def test_samples_are_shown_at_each_evaluation_and_the_judged_step_is_marked(tmp_path: Path) -> None:
    write_files(tmp_path)
    add_samples(tmp_path, (0, 80, 120), prompts=2)
    page = page_of(tmp_path, "Promoted", "promoted")
    shown = page.partition("## Samples")[2].replace("\\", "")
    for prompt in ("Where to 0?", "Where to 1?"):
        table = shown.partition(prompt)[2].split("\n\n")[1]
        assert table.splitlines()[2:] == [
            "| 0 | after 0 |",
            "| 80 (judged) | after 80 |",
            "| 120 | after 120 |",
        ]


def test_the_samples_of_a_long_night_are_a_small_table(tmp_path: Path) -> None:
    write_files(tmp_path)
    add_samples(tmp_path, range(0, 10_001, 10), prompts=50)
    samples = page_of(tmp_path, "Promoted", "promoted").partition("## Samples")[2]
    tables = [part for part in samples.split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    rows = tables[0].splitlines()[2:]
    steps = [row.split("|")[1].strip() for row in rows]
    assert steps[0] == "0"
    assert steps[-1] == "10,000"
    assert "80 (judged)" in steps
    assert len(rows) <= 8
    assert "8 of 1001 evaluations to 4 of 50 prompts" in samples


def test_a_night_without_a_verdict_says_so(tmp_path: Path) -> None:
    facts = facts_of(page_of(tmp_path, Outcome.RUNNING, "begun"))
    assert facts["Loss"] == "not judged yet"
    assert facts["Answers"] == "not asked yet"
    assert facts["Data"].endswith("not read yet")
    facts = facts_of(page_of(tmp_path, "Skipped", "skipped: data unchanged since c4a3c4"))
    assert (facts["Loss"], facts["Answers"]) == ("not judged", "not asked")


def test_an_error_of_several_lines_is_told_on_one(tmp_path: Path) -> None:
    message = (
        "DatasetError: The data set is rejected: 1 error.\n  train.jsonl:4: bad-json: no value\n"
        "Correct these."
    )
    facts = facts_of(page_of(tmp_path, "Failed", message))
    assert facts["Verdict"] == (
        "DatasetError: The data set is rejected: 1 error. train.jsonl:4: bad-json: no value; "
        "Correct these."
    )
