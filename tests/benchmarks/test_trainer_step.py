"""The benchmark of the trainer's step where there is no GPU, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import trainer_step
from benchmarks.commands import read_rows
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.shapes import WINDOWS as WINDOWS_ALONE
from nested_core.storage.run_directory import RunDirectory

SHAPE = SHAPES["tiny"]


@pytest.mark.slow("trains for its windows")
@pytest.mark.usefixtures("own_random_state")
def test_the_trainer_is_measured_in_windows_of_full_batches_as_wide_as_those_of_the_step_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_step, "WARM", 1)
    monkeypatch.setattr(trainer_step, "WINDOWS", 2)
    trainer_step.write_inputs(SHAPE, tmp_path)
    row = trainer_step.measure_trainer(SHAPE, tmp_path)
    assert len(row["milliseconds"]) == 2
    assert min(row["milliseconds"]) > 0
    run = RunDirectory(tmp_path / "run")
    reports = [json.loads(line) for line in run.metrics.read_text().splitlines()][1:]
    assert [report["step"] for report in reports] == [10, 20, 30, 40]
    assert [report["trained_tokens"] for report in reports] == [
        step * SHAPE.batch * SHAPE.length for step in (10, 20, 30, 40)
    ]
    tokens = json.loads(run.dataset.read_text())["splits"]["train"]["tokens"]
    assert (tokens["widths"], tokens["padding_share"], tokens["truncated_rows"]) == (1, 0, 0)


@pytest.mark.slow("measures in three processes, each of which imports mlx_lm")
def test_a_table_is_made_in_several_goes(tmp_path: Path) -> None:
    rows = tmp_path / "ROWS.jsonl"
    words = ["-m", "benchmarks.trainer_step", str(rows), "--folder", str(tmp_path / "work")]

    def call(*options: str) -> str:
        command = [sys.executable, *words, "--sizes", "tiny", "--times", "1", *options]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert call("--seconds", "0") == ""
    whole = call()
    alone, trainer = read_rows(rows)
    assert (alone["what"], len(alone["milliseconds"])) == ("alone", WINDOWS_ALONE)
    assert (trainer["what"], len(trainer["milliseconds"])) == ("trainer", trainer_step.WINDOWS)
    again = call()
    assert len(read_rows(rows)) == 2
    assert again == call("--report") == whole.splitlines(keepends=True)[-1]


def test_the_share_of_the_speed_is_told_where_both_were_measured() -> None:
    def row(what: str, *milliseconds: float) -> dict[str, object]:
        return {"size": "3B", "what": what, "milliseconds": milliseconds, "peak_gib": 1.25}

    rows = [row("alone", 9, 10, 50), row("alone", 20), row("trainer", 20, 40, 30)]
    assert list(trainer_step.make_table(rows[:2])) == [
        "3B: the step alone 10.00, 20.00 ms (at most 1.25 GiB)"
    ]
    assert list(trainer_step.make_table(rows)) == [
        "3B: the step alone 10.00, 20.00 ms (at most 1.25 GiB), "
        "the trainer's 30.00 ms (at most 1.25 GiB): 0.500 of its speed"
    ]
