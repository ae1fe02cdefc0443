"""Rules over frames: a finding for each failing row, at most 1,000 listed, never a silent pass."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from nested_core.data.rules.rule_table import MAX_LISTED_FINDINGS, FrameRules, Rule
from nested_core.errors import DatasetError
from nested_core.records.dataset import DatasetReport, Findings
from nested_core.storage.atomic import canonical_json
from tests.builders.data_sets import load
from tests.core.data.conftest import WriteData

TABLE = FrameRules(
    columns={"size": pl.Int32, "is_good": pl.Boolean},
    rules=(
        Rule("small", "warning", pl.col("size") < 10, "{size} is too large"),
        Rule("bad", "error", pl.col("is_good"), "not good"),
    ),
)


def judged(table: FrameRules, **columns: list[Any]) -> Findings:
    findings = Findings()
    height = len(next(iter(columns.values())))
    frame = pl.DataFrame(columns, schema_overrides={"size": pl.Int32})
    table.add_findings(
        frame.with_columns(file=pl.lit("a"), line=pl.int_range(1, height + 1, dtype=pl.Int32)),
        findings,
    )
    return findings


def test_each_failing_row_is_a_finding_and_null_passes() -> None:
    findings = judged(TABLE, size=[9, 11, None, 12], is_good=[True, True, True, False])
    found = [(f.line, f.check, f.severity, f.message) for f in findings.listed]
    assert found == [
        (2, "small", "warning", "11 is too large"),
        (4, "small", "warning", "12 is too large"),
        (4, "bad", "error", "not good"),
    ]
    assert findings.lines_with_errors("a") == {4}


def test_one_finding_stands_for_all_rows_of_a_habit_at_the_first_or_the_worst() -> None:
    rules = (
        Rule("first", "warning", pl.col("size") < 10, "{count}: {places}", once=True),
        Rule("worst", "warning", pl.col("size") < 10, "{size}", once=True, worst="size"),
    )
    table = FrameRules(columns={"size": pl.Int32}, rules=rules)
    found = [(f.line, f.message) for f in judged(table, size=[1, 11, 12, 11, 20, 13, 14]).listed]
    assert found == [(2, "6: 2, 3, 4, 5, 6, ..."), (5, "20")]


@pytest.mark.parametrize(
    "columns", [{"size": [1]}, {"size": ["1"], "is_good": [True]}, {"size": [1], "is_good": [None]}]
)
def test_a_frame_that_does_not_fit_is_an_error_and_never_a_pass(columns: dict[str, Any]) -> None:
    frame = pl.DataFrame(columns).with_columns(file=pl.lit("a"), line=pl.lit(1))
    with pytest.raises(TypeError, match="do not fit"):
        TABLE.add_findings(frame, Findings())


def test_at_most_a_thousand_findings_of_a_check_are_listed_and_the_rest_are_counted() -> None:
    findings = judged(TABLE, size=[11] * 2_500, is_good=[False] * 2_500)
    for check in ("small", "bad"):
        listed = [f for f in findings.listed if f.check == check]
        assert [f.line for f in listed] == [*range(1, 1_001), None]
        assert listed[-1].count == 1_500
        assert listed[-1].message == "1,500 more of these: the first 1,000 are listed"
    assert findings.lines_with_errors("a") == set(range(1, 2_501))


def test_a_data_set_with_many_warnings_has_a_small_report(write_data: WriteData) -> None:
    rows = [b'{"text": "The river is near."}'] * 30_000
    folder = write_data(train=rows, valid=[{"text": "A lake."}])
    report, _ = load(folder)
    duplicates = [f for f in report.findings if f.check == "duplicate"]
    assert len(duplicates) == MAX_LISTED_FINDINGS + 1
    written = report.to_json()
    assert len(canonical_json(written)) < 200_000  # 30,000 of them would be 4 MB
    assert written["counts"]["warning"] == 29_999
    rest = next(f for f in written["findings"] if f["line"] is None and f["check"] == "duplicate")
    assert rest["count"] == 28_999
    assert DatasetReport.from_json(json.loads(json.dumps(written))) == report
    assert report.describe_warnings() == (
        "data: 29,999 warnings (duplicate 29,999), explained by `nested-tune validate`"
    )


def test_lines_whose_error_is_not_listed_are_rejected_and_counted(write_data: WriteData) -> None:
    bad: list[Any] = [{"prompt": str(number)} for number in range(1_500)] + [b"{"] * 1_200
    folder = write_data(train=[*[{"text": f"a {n}"} for n in range(8)], *bad], valid=[])
    report, _ = load(folder)
    assert report.splits["train"].rejected == 2_700
    assert report.splits["train"].rows == 8
    counted = {f.check: f.count for f in report.errors if f.count is not None}
    assert counted == {"missing-field": 500, "bad-json": 200}
    with pytest.raises(DatasetError, match="2,701 errors in 2,700 lines"):
        report.raise_if_rejected()


def test_judging_changes_no_setting_of_pandera_and_no_variable(write_data, monkeypatch) -> None:
    from pandera.api.base.schema import BaseSchema
    from pandera.config import get_config_context, get_config_global

    monkeypatch.setenv("PANDERA_VALIDATION_DEPTH", "garbage")
    before = dict(os.environ), str(get_config_global()), str(get_config_context())
    backends = dict(BaseSchema.BACKEND_REGISTRY)
    folder: Path = write_data(train=[{"text": "a"}] * 4, valid=[])
    assert load(folder)[0].warnings
    assert (dict(os.environ), str(get_config_global()), str(get_config_context())) == before
    assert backends == BaseSchema.BACKEND_REGISTRY
