"""No environment variable turns a check off: the same findings, whatever it says of pandera."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.core.data.conftest import WriteData

OFF: tuple[dict[str, str], ...] = (
    {"PANDERA_VALIDATION_ENABLED": "False", "PANDERA_BACKEND": "ibis"},
    {"PANDERA_VALIDATION_DEPTH": "SCHEMA_ONLY", "PANDERA_CACHE_DATAFRAME": "True"},
    {"PANDERA_USE_NARWHALS_BACKEND": "True"},
)
ROOT = Path(__file__).parents[3]


def chat(question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def validate(folder: Path, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "flows.cli", "validate", "-c", "examples/geography.yaml"]
    done = subprocess.run(
        [*command, "--data", str(folder), "--max-seq-length", "40", "--json"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)["findings"]


@pytest.fixture
def bad_data(write_data: WriteData) -> Path:
    train: list[Any] = [chat(f"Where is {place}?", f"In {place}land.") for place in "ABCD"]
    train += [
        train[0],
        chat("a", ""),
        b"{",
        chat("Mail?", "jane.doe@firm.org"),
        chat("b", "c" * 90),
    ]
    return write_data(train=train, test=[train[1]])


def test_no_variable_of_pandera_changes_a_finding(bad_data: Path) -> None:
    code, findings = validate(bad_data)
    assert code == 3
    found = {(finding["file"], finding["line"], finding["check"]) for finding in findings}
    assert found >= {
        ("train.jsonl", 5, "duplicate"),
        ("train.jsonl", 6, "blank-field"),
        ("train.jsonl", 7, "bad-json"),
        ("train.jsonl", 8, "personal-data"),
        ("train.jsonl", 9, "truncated"),
        ("valid.jsonl", None, "no-validation-set"),
        ("test.jsonl", 1, "leakage"),
    }
    for environment in OFF:
        assert validate(bad_data, **environment) == (code, findings), environment
