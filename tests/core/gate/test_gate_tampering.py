"""A run whose folder was changed after training: damage, never a verdict; and its data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nested_core.errors import DamagedError, DatasetError, GateRejected
from nested_core.gate.evidence.run_evidence import collect_evidence
from tests.builders.candidates import STEPS, Candidate, example_data, train_candidate
from tests.builders.data_sets import write_lines


@pytest.mark.slow("writes and reads 72 MiB")
def test_the_report_on_a_large_data_set_is_read_whatever_its_size(candidate: Candidate) -> None:
    """449,000 duplicates made dataset.json 72 MiB; the gate refused what it had written itself."""
    report = json.loads(candidate.run.dataset.read_bytes())
    candidate.run.dataset.write_text(json.dumps(report | {"padding": "x" * (72 * 1024 * 1024)}))
    assert collect_evidence(candidate.run).checkpoint.step == STEPS


def test_a_test_set_is_judged_on_where_there_is_one(tmp_path: Path) -> None:
    data = example_data(tmp_path / "data")
    asked = {"role": "user", "content": "I want to see France. Where to?"}
    answered = {"role": "assistant", "content": "Go to Paris, the capital of France!"}
    write_lines(data / "test.jsonl", [{"messages": [asked, answered]}])
    verdict = train_candidate(tmp_path / "run", data=str(data)).verdict()
    assert verdict.validation is not None
    assert verdict.validation.selected_on_same_data is False


@pytest.mark.slow("trains and judges a run of its own")
def test_a_test_set_that_repeats_the_validation_set_counts_as_selected_on(tmp_path: Path) -> None:
    data = example_data(tmp_path / "data")
    shutil.copy(data / "valid.jsonl", data / "test.jsonl")
    policy = {"leakage": "drop"}
    verdict = train_candidate(tmp_path / "run", data=str(data), data_policy=policy).verdict()
    assert verdict.validation is not None
    assert verdict.validation.selected_on_same_data is True


def test_the_data_that_are_judged_on_are_those_that_were_validated(candidate: Candidate) -> None:
    valid = Path(candidate.config.data) / "valid.jsonl"
    lines = valid.read_bytes()
    valid.write_bytes(lines.splitlines(keepends=True)[0])
    try:
        with pytest.raises((DatasetError, DamagedError, GateRejected), match="data"):
            candidate.judge()
    finally:
        valid.write_bytes(lines)
