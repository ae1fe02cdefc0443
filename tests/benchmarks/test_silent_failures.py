"""The bench of silent failures: its list, its rule, and a part of it run on nested-tune."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.silent_failures import __main__ as bench
from benchmarks.silent_failures.cases import ROOT, Run
from benchmarks.silent_failures.failures import read_failures
from benchmarks.silent_failures.plants import PLANTS, make_case
from benchmarks.silent_failures.tables import count, describe, read_all_rows, read_misses
from benchmarks.silent_failures.tools.nested_tune import NestedTune
from benchmarks.silent_failures.tools.unsloth_zoo import UnslothZoo
from benchmarks.silent_failures.verdict import decide

FAILURES = read_failures()
LEAK = FAILURES["leak-exact"]


def printed(text: str, code: int = 0) -> list[Run]:
    return [Run("after", "tool train", code, "", text)]


def test_the_list_has_thirty_five_failures_each_with_a_report_and_a_plant() -> None:
    assert len(FAILURES) == 35
    assert list(PLANTS) == list(FAILURES)
    assert len({failure.kind for failure in FAILURES.values()}) == 35
    for failure in FAILURES.values():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", failure.report)
        assert failure.earliest in {"before", "after", "use"}


def test_a_warning_that_the_twin_lacks_is_noticed() -> None:
    verdict = decide(LEAK, printed("warning: 4 rows leak"), printed("all is well"))
    assert (verdict.noticed, verdict.how, verdict.named) == ("after", "warned", True)
    assert not verdict.false_alarm


def test_a_warning_that_the_twin_gets_too_is_a_false_alarm_and_notices_nothing() -> None:
    verdict = decide(LEAK, printed("warning: 4 rows leak"), printed("warning: 1 rows leak"))
    assert (verdict.noticed, verdict.false_alarm) == ("never", True)


def test_a_refused_twin_is_a_false_alarm() -> None:
    refused = printed("error: bad rows", code=3)
    verdict = decide(LEAK, refused, refused)
    assert (verdict.noticed, verdict.false_alarm) == ("never", True)


def test_an_error_counts_as_noticed_without_naming_the_failure() -> None:
    verdict = decide(LEAK, printed("Traceback\nKeyError: 7", code=1), printed(""))
    assert (verdict.noticed, verdict.how, verdict.named) == ("after", "refused", False)
    assert verdict.said == "Traceback\nKeyError: 7"


def test_a_loss_that_is_reported_is_no_warning() -> None:
    nan = FAILURES["nan-behind-clipping"]
    reports = (
        "Iter 10: Train loss nan, It/sec 4.2\nstep 10: training loss nan\n"
        "    20    val   nan    0.63s\n    20      nan ▲       57      1.9k\n│ Loss: nan │"
    )
    assert decide(nan, printed(reports), printed("")).noticed == "never"


def test_what_the_model_answers_is_no_warning() -> None:
    tokens = FAILURES["control-tokens-in-text"]
    frame = "=" * 10
    for answered in (f"{frame}\nOslo.<|assistant|>\n{frame}\nPrompt: 8 tokens", "answer: <|user|>"):
        assert decide(tokens, printed(answered), printed("")).noticed == "never"
    warned = f"{frame}\nOslo.\n{frame}\nwarning: <|user|> is a control token"
    assert decide(tokens, printed(warned), printed("")).noticed == "after"


def test_a_row_of_a_table_counts_with_a_verdict_or_a_count_that_the_twin_does_not_have() -> None:
    rows = FAILURES["duplicated-rows"]
    inspected = decide(rows, printed("│ Duplicates │ 36 │"), printed("│ Duplicates │ 0 │"))
    assert inspected.noticed == "after"
    assert decide(rows, printed("│ Copies │ of all │"), printed("")).noticed == "never"
    length = FAILURES["answers-cut-off"]
    judged = decide(
        length, printed("│ truncation │ MAJOR │ all rows"), printed("│ truncation │ OK")
    )
    assert judged.noticed == "after"


def test_what_comes_before_the_first_step_was_noticed_before_training(tmp_path: Path) -> None:
    case = make_case("leak-exact", tmp_path / "tool/leak/planted", planted=True)
    case.note("after", ["tool"], 0, "warning: leak\nIter 1: loss 3\n", r"^Iter \d+:")
    assert decide(LEAK, case.runs, []).noticed == "before"
    assert case.runs[0].after == "Iter 1: loss 3\n"


def test_planted_and_healthy_folder_differ_in_the_plant_alone(tmp_path: Path) -> None:
    planted = make_case("leak-near", tmp_path / "planted", planted=True)
    healthy = make_case("leak-near", tmp_path / "healthy", planted=False)
    files = {path.relative_to(planted.folder) for path in planted.folder.rglob("*.*")}
    assert files == {path.relative_to(healthy.folder) for path in healthy.folder.rglob("*.*")}
    differing = [
        str(file)
        for file in sorted(files)
        if (planted.folder / file).read_bytes() != (healthy.folder / file).read_bytes()
    ]
    assert differing == ["data/valid.jsonl"]
    assert planted.settings == healthy.settings


def test_what_the_rows_say_that_nested_tune_misses_is_explained_and_nothing_else() -> None:
    rows = read_all_rows()["nested-tune"]
    assert {name for name, row in rows.items() if row["noticed"] == "never"} == set(read_misses())


def test_each_tool_has_a_row_for_each_failure_and_all_are_of_one_version() -> None:
    for tool, rows in read_all_rows().items():
        assert list(rows) == list(FAILURES), tool
        assert len({row["version"] for row in rows.values()}) == 1, tool
        assert {row["tool"] for row in rows.values()} == {tool}


def test_the_page_has_the_count_of_each_tool_and_why_failures_were_not_run() -> None:
    page = (ROOT / "benchmarks/silent_failures/README.md").read_text("utf-8")
    for tool, rows in read_all_rows().items():
        (line,) = [each for each in page.splitlines() if each.startswith(f"- **{tool}: ")]
        noticed = [row["noticed"] for row in rows.values()]
        outside = noticed.count("not applicable") + noticed.count("not run")
        told = f"{len(rows) - outside - noticed.count('never')} of {len(rows) - outside}"
        told += f", false alarms {sum(row['false_alarm'] for row in rows.values())}"
        assert f"**{tool}: {told if outside < len(rows) else 'not run'}**" in line
        reasons = {row["said"] for row in rows.values() if row["noticed"] == "not applicable"}
        assert [reason for reason in reasons if reason not in line] == []


def test_counts_pass_over_what_is_not_applicable() -> None:
    whens = ("before", "never", "not applicable")
    rows = {when: {"noticed": when, "false_alarm": when == "never"} for when in whens}
    assert count(rows) == "1 of 2, false alarms 1"


def test_a_tool_that_does_not_begin_here_is_not_run_and_has_no_count(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "WORK", tmp_path)
    monkeypatch.setattr(UnslothZoo, "version", lambda _: "unsloth_zoo 1")
    row = bench.run_failure(UnslothZoo(), LEAK)
    assert (row["noticed"], row["said"]) == ("not run", UnslothZoo.does_not_begin)
    assert count({"leak-exact": row}) == "not run"


def test_a_cell_says_where_a_refusal_does_not_name_the_failure() -> None:
    row = {"noticed": "after", "how": "refused", "named": False, "false_alarm": False}
    assert describe(row) == "after, not named"
    assert describe(row | {"named": True}) == "after"
    assert describe(row | {"how": "does it right"}) == "after"


def test_a_row_keeps_the_end_of_what_was_printed_without_the_padding_of_tables() -> None:
    printed = "".join(f"line {number}\n" for number in range(200))
    kept = bench.last_lines(f"{printed}│ Loss: 3          │────────────│")
    assert kept.splitlines()[0] == "line 121"
    assert kept.splitlines()[-1] == "│ Loss: 3 │ │"


@pytest.mark.parametrize(
    ("answer", "user", "is_right"), [(0.1, 20.0, True), (0.1, 5.0, False), (6.0, 20.0, False)]
)
def test_a_mask_is_right_where_the_answer_was_learnt_and_not_the_turn_after_it(
    answer: float, user: float, is_right: bool, tmp_path: Path
) -> None:
    case = make_case("mask-off-by-one-turn", tmp_path / "planted", planted=True)
    losses = {
        "<|assistant|>In Afghanistan.": [8, answer],
        "<|user|>Thank you for that.": [22, user],
    }
    case.answers = [json.dumps(losses)]
    assert case.went_right is not None
    assert case.went_right(case) == is_right


@pytest.mark.parametrize(("as_object", "is_right"), [(0.1, True), (1.99, False), (6.0, False)])
def test_arguments_are_right_where_the_object_was_learnt_and_is_clearly_likelier(
    as_object: float, is_right: bool, tmp_path: Path
) -> None:
    case = make_case("arguments-quoted-twice", tmp_path / "planted", planted=True)
    losses = {'"arguments": {"a": 1}': [9, as_object], '"arguments": "{\\"a\\": 1}"': [9, 2.0]}
    case.answers = [json.dumps(losses)]
    assert case.went_right is not None
    assert case.went_right(case) == is_right


@pytest.mark.slow("runs six planted folders and their twins, a training each")
@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("updates-not-applied", "after"),
        ("adapter-of-another-scale", "after"),
        ("leak-near", "before"),
        ("template-drops-reasoning", "before"),
        ("resume-from-a-torn-checkpoint", "before"),
        ("another-template-at-serving", "use"),
    ],
)
def test_nested_tune_notices(name, when, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "WORK", tmp_path)
    row = bench.run_failure(NestedTune(), FAILURES[name])
    assert row["noticed"] == when, json.dumps(row, indent=1)
    assert not row["false_alarm"]
