"""Runs of the example's base that learn rows of a test, and what their verdicts tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.sections import ControlsSection
from nested_core.gate.judge import run_gate_checks
from nested_core.records.dataset import read_dataset_record
from nested_core.records.verdict import Verdict
from tests.builders.candidates import train_candidate
from tests.builders.data_sets import write_lines
from tests.example import example_config

Row = dict[str, Any]
ROWS_NAME = "suspect-rows.jsonl"  # as docs/runs.md has it
TRAINS = pytest.mark.slow("trains and judges a run of its own")
LEARNS: dict[str, Any] = {
    "iters": 120,
    "batch_size": 8,
    "num_layers": 6,
    "nested": {"frequencies": [1]},
    "gate": {"controls": dict.fromkeys(ControlsSection.model_fields, True)},
}


def learn(
    folder: Path, train: Sequence[Row], held_out: Sequence[Row] | None, **changes: Any
) -> Verdict:
    """The verdict on a run that learns these rows, judged by the held-out ones if there are some.

    The run has the texts of the rows that it warns of, too.
    """
    write_lines(folder / "data" / "train.jsonl", train)
    if held_out is not None:
        write_lines(folder / "data" / "valid.jsonl", held_out)
    config = example_config(**LEARNS | {"data": str(folder / "data"), **changes})
    candidate = train_candidate(folder / "run", config)
    checked = run_gate_checks(config, candidate.run)
    (folder / "run" / ROWS_NAME).write_bytes(checked.written_files.get(ROWS_NAME, b""))
    return checked.verdict


def kinds(verdict: Verdict) -> list[str]:
    """The kinds of the warnings in gate.json."""
    return [warning["kind"] for warning in verdict.to_json()["controls"]]


def list_checks(folder: Path) -> set[str]:
    """The checks that warned of the data of the run in this folder."""
    return {one.check for one in read_dataset_record(folder / "run" / "dataset.json").warnings}
