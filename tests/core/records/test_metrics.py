"""metrics.jsonl: one line a report, whole lines only, truncated where training is resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core.records import metrics as metrics_file
from nested_core.records.metrics import (
    append_metrics,
    latest_values,
    read_metrics,
    truncate_metrics,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with reports of steps 0 to 4."""
    for step in range(5):
        append_metrics(tmp_path / "metrics.jsonl", {"step": step, "loss": step / 3})
    return tmp_path / "metrics.jsonl"


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_each_report_is_one_line_of_json_that_can_be_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for count in (1, 2, 3):
        append_metrics(path, {"step": count, "note": "é\n\u2028", "updates": [count, 0]})
        lines = path.read_text().split("\n")
        assert (len(lines), lines[-1]) == (count + 1, "")
        assert json.loads(lines[-2]) == {"step": count, "note": "é\n\u2028", "updates": [count, 0]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_has_no_word_for_becomes_null(value: float, tmp_path: Path) -> None:
    append_metrics(tmp_path / "metrics.jsonl", {"step": 1, "loss": value, "rate": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "rate": 0.5}\n'


@given(loss=st.floats(0, 1e6, width=32))
def test_a_float32_loss_keeps_its_full_precision(tmp_path_factory, loss) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    append_metrics(path, {"loss": mx.array(loss).item()})
    assert read_metrics(path) == [{"loss": loss}]


def test_of_a_missing_file_there_are_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_line_that_was_cut_anywhere_is_passed_over(path: Path) -> None:
    whole = path.read_bytes()
    last = len(whole) - len(b'{"step": 4, "loss": 1.3333333333333333}\n')
    for length in range(last, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert steps(path) == [0, 1, 2, 3]
    path.write_bytes(whole[:-1])
    assert steps(path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("step", "count", "kept"),
    [
        (0, 0, []),
        (0, 9, [0]),
        (2, 9, [0, 1, 2]),
        (9, 9, [0, 1, 2, 3, 4]),
        (9, 2, [0, 1]),
        (2, 2, [0, 1]),
    ],
)
def test_truncating_keeps_so_many_reports_up_to_a_step(path, step, count, kept) -> None:
    before: list[dict[str, Any]] = read_metrics(path)
    assert truncate_metrics(path, step, count) == len(kept)
    assert read_metrics(path) == before[: len(kept)]
    assert steps(path) == kept


def test_after_a_cut_a_half_written_line_is_gone_and_reports_go_on(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])
    truncate_metrics(path, 3, 9)
    append_metrics(path, {"step": 4})
    assert steps(path) == [0, 1, 2, 3, 4]
    assert [path.name for path in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_damaged_line_in_the_middle_is_named_and_costs_no_other(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"step": 2, "lo\n', *lines[3:]]))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: 1 of 5 lines are damaged .*: line 3\."):
        assert steps(path) == [0, 1, 3, 4]
    with pytest.warns(UserWarning, match=r"line 3\."):
        assert truncate_metrics(path, 3, 5) == 3
    assert steps(path) == [0, 1, 3]


HOSTILE_VALUES = [
    ("step", "1e308"),
    ("step", "9" * 400),
    ("step", "-1"),
    ("iteration", "1.5"),
    ("iteration", str(10**15 + 1)),
    ("trained_tokens", "9" * 5000),
    ("loss", "1e400"),
    ("val_loss", "-1e308"),
    ("loss", "9" * 400),
    ("iterations_per_second", "5e-324"),
    ("iterations_per_second", "-1e-300"),
    ("iterations_per_second", "1e-10"),
    ("loss", "true"),
    ("updates", "[1e308]"),
    ("updates", "3"),
    *(("samples", each) for each in ("null", "3", "[3]", '[{"prompt": "a"}]')),
    ("samples", '[{"prompt": 3, "answer": []}]'),
    ("note", "[" * 5000 + "]" * 5000),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE_VALUES, ids=[key for key, _ in HOSTILE_VALUES])
def test_a_value_that_no_run_reports_makes_a_damaged_line(path: Path, key: str, value: str) -> None:
    with path.open("a") as file:
        file.write(f'{{"loss": 0.5, "{key}": {value}}}\n')
    with pytest.warns(UserWarning, match=r"1 of 6 lines are damaged .*: line 6\."):
        assert steps(path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("loss", [0, -0.0, 1e-30, 3.4e38, 7])
def test_any_number_that_a_run_may_report_is_read(tmp_path: Path, loss: float) -> None:
    append_metrics(tmp_path / "metrics.jsonl", {"step": 1, "loss": loss})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": loss}]


def test_the_latest_values_are_those_of_the_last_records_that_have_them(path: Path) -> None:
    append_metrics(path, {"step": 5, "loss": None, "val_loss": 0.25})
    assert latest_values(read_metrics(path)) == {"step": 5, "loss": 4 / 3, "val_loss": 0.25}
    assert latest_values([]) == {}


def test_a_line_without_an_end_is_read_in_bounded_memory(path, monkeypatch) -> None:
    monkeypatch.setattr(metrics_file, "MAX_RECORD_BYTES", 64)
    with path.open("a") as file:
        file.write("x" * 1000 + "\n" + '{"step": 5}\n' + "y" * 64 + "\n" + "z" * 1000)
    with pytest.warns(UserWarning, match=r"2 of 8 lines are damaged .*: line 6, 8\."):
        assert steps(path) == [0, 1, 2, 3, 4, 5]


def test_truncating_what_is_not_there_makes_an_empty_file(tmp_path: Path) -> None:
    assert truncate_metrics(tmp_path / "metrics.jsonl", 3, 9) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
