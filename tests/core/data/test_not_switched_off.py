"""No environment variable turns a check off: the same findings, whatever it says of pandera."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nested_core.seams import is_there
from tests.builders.data_sets import GOOD, chat, write_lines
from tests.fork_server import python
from tests.left_out import slow_except

OFF: tuple[dict[str, str], ...] = (
    {"PANDERA_VALIDATION_ENABLED": "False", "PANDERA_BACKEND": "ibis"},
    {"PANDERA_VALIDATION_DEPTH": "SCHEMA_ONLY", "PANDERA_CACHE_DATAFRAME": "True"},
    {"PANDERA_USE_NARWHALS_BACKEND": "True"},
)
GARBAGE = {"PANDERA_VALIDATION_DEPTH": "garbage", "PANDERA_VALIDATION_ENABLED": "perhaps"}
NEW_PROCESS = """
import sys
assert "pandera" not in sys.modules  # which reads the variables when it is imported
"""
COMMAND = f"{NEW_PROCESS}from flows.cli import main; sys.exit(main())"
AFTER_PANDERA = f"{NEW_PROCESS}import pandera.polars; from flows.cli import main; sys.exit(main())"
ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow("processes that import pandera")


def validate(
    folder: Path, environment: dict[str, str], program: str = COMMAND
) -> tuple[int, list[dict[str, Any]]]:
    script = folder.with_name("program.py")
    script.write_text(program)
    done = python(
        script,
        "validate",
        *("-c", "examples/geography.yaml", "--data", folder, "--max-seq-length", 40, "--json"),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    return done.returncode, json.loads(done.stdout)["findings"]


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = [*GOOD, GOOD[0], chat("a", ""), chat("Mail?", "jane.doe@firm.org"), chat("b", "c" * 90)]
    folder = tmp_path_factory.mktemp("bad")
    write_lines(folder / "train.jsonl", [*train, b"{"])
    write_lines(folder / "test.jsonl", train[1:2])
    return folder


@pytest.fixture(scope="module")
def expected(bad_data: Path) -> tuple[int, list[dict[str, Any]]]:
    return validate(bad_data, {})


def test_the_data_is_bad_in_many_ways(expected: tuple[int, list[dict[str, Any]]]) -> None:
    code, findings = expected
    assert code == 3
    found = {(finding["file"], finding["line"], finding["check"]) for finding in findings}
    assert found >= {
        ("train.jsonl", 5, "duplicate"),
        ("train.jsonl", 6, "blank-field"),
        *([("train.jsonl", 7, "personal-data")] if is_there("secrets") else ()),
        ("train.jsonl", 8, "truncated"),
        ("train.jsonl", 9, "bad-json"),
        ("valid.jsonl", None, "no-validation-set"),
        ("test.jsonl", 1, "leakage"),
    }


@pytest.mark.parametrize(
    "environment",
    slow_except([*OFF, GARBAGE], OFF[0], reason="a process that imports pandera"),
    ids=lambda variables: "-".join(variables),
)
def test_no_variable_of_pandera_changes_a_finding(environment, bad_data, expected) -> None:
    assert validate(bad_data, environment) == expected


@pytest.mark.parametrize("environment", OFF, ids=lambda variables: next(iter(variables)))
def test_nor_where_another_has_imported_pandera_under_it_before(
    environment: dict[str, str], bad_data: Path, expected: tuple[int, list[dict[str, Any]]]
) -> None:
    assert validate(bad_data, environment, AFTER_PANDERA) == expected
