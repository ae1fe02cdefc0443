"""The list preferences.toml of the bench of silent failures, run on nested-tune's commands."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.silent_failures import __main__ as bench
from benchmarks.silent_failures import preference_plants
from benchmarks.silent_failures.failures import read_failures
from benchmarks.silent_failures.tables import count, read_all_rows
from benchmarks.silent_failures.tools.mlx_lm import MlxLm
from benchmarks.silent_failures.tools.nested_tune import NestedTune

FAILURES = read_failures("preferences")
ROWS = read_all_rows("preferences")


def test_the_list_has_five_failures_each_with_a_report_a_plant_and_a_row() -> None:
    assert len(FAILURES) == 5
    assert list(preference_plants.PLANTS) == list(FAILURES) == list(ROWS["nested-tune"])
    assert not FAILURES.keys() & read_failures().keys()
    for failure in FAILURES.values():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", failure.report)


def test_all_five_were_noticed_and_no_twin() -> None:
    assert list(ROWS) == ["nested-tune"]
    assert count(ROWS["nested-tune"]) == "5 of 5, false alarms 0"


def test_a_tool_without_commands_for_the_list_is_refused(monkeypatch, capsys) -> None:
    words = ["bench", "--tool", MlxLm.name, "--list", "preferences"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert f"no commands of {MlxLm.name} for preferences.toml" in capsys.readouterr().err


@pytest.mark.slow("runs a planted folder and its twin, up to four trainings of six steps")
@pytest.mark.parametrize("name", FAILURES)
def test_nested_tune_notices(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "WORK", tmp_path)
    row = bench.run_failure(NestedTune(), FAILURES[name])
    kept = ROWS["nested-tune"][name]
    assert (row["noticed"], row["how"]) == (kept["noticed"], kept["how"]), json.dumps(row, indent=1)
    assert row["named"]
    assert not row["false_alarm"]
    assert all(run["code"] == 0 for run in row["healthy"])
