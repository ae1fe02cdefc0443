"""The report: what it counts, how it is written down, and how it rejects."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import DatasetError
from nested_core.records.dataset import DatasetReport, PromptFormat
from tests.builders.data_sets import GOOD, HELD_OUT, chat, load, write_lines
from tests.core.data.conftest import WriteData
from tests.example import MODEL


def report_on(folder: Any, tokenizer: TokenizerSource | None = None) -> DatasetReport:
    return load(folder, tokenizer)[0]


def test_every_line_is_counted_once(write_data: WriteData) -> None:
    folder = write_data(train=[*GOOD, b"", b"{", b"5", b"  "], valid=HELD_OUT)
    train = report_on(folder).splits["train"]
    assert (train.lines, train.blank, train.rejected, train.rows) == (8, 2, 2, 4)
    assert train.roles == {"user": 4, "assistant": 4}
    assert train.format == "chat"


def test_the_json_holds_the_findings_the_counts_and_the_digest(write_data, tokenizer) -> None:
    report = report_on(write_data(train=[*GOOD, b"{"], valid=HELD_OUT), tokenizer)
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["findings"][0] == {
        "file": "train.jsonl",
        "line": 5,
        "severity": "error",
        "check": "bad-json",
        "message": "not valid JSON at column 1: EOF while parsing an object",
    }
    assert written["counts"]["error"] == 1
    assert written["counts"]["warning"] == 0
    assert written["digest"] == report.digest
    assert written["splits"]["train"]["rows"] == 4
    assert written["splits"]["valid"]["tokens"]["supervised"] > 0


def test_the_rejection_says_an_error_of_many_lines_once(write_data: WriteData) -> None:
    bad = [{"prompt": "x" * 5000 + str(number)} for number in range(300)]
    report = report_on(write_data(train=[*GOOD, *bad], valid=HELD_OUT))
    assert len(report.errors) == 300
    with pytest.raises(DatasetError) as caught:
        report.raise_if_rejected()
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("is rejected: 300 errors in 300 lines.")
    assert "--no-tokenize`, with your -c if any for --data, lists them." in lines[-1]
    assert lines[1] == (
        "  train.jsonl:5: missing-field: completion is missing (and 299 more: lines 6, 7, ...)"
    )
    assert lines[2].startswith("Correct these; `nested-tune validate --data ")
    assert len(lines) == 3


def test_the_rejection_names_the_first_causes_and_counts_the_rest(write_data: WriteData) -> None:
    fields = [{name: "a"} for name in ("prompt", "completion")]
    kinds: list[Any] = [{"text": value} for value in (1, "", None, "a\0", ["a"], {"a": 1})]
    unknown = [{f"k{letter}": 1} for letter in "abcdefg"]
    report = report_on(write_data(train=[*GOOD, *fields, *kinds, *unknown], valid=HELD_OUT))
    assert len(report.errors) == 16
    with pytest.raises(DatasetError) as caught:
        report.raise_if_rejected()
    lines = str(caught.value).splitlines()
    assert [line[:14] for line in lines[1:11]] == ["  train.jsonl:"] * 10
    assert lines[11].startswith("  and ")
    shown = sum(1 + int(more) for more in re.findall(r"\(and (\d+) more", str(caught.value)))
    shown += sum("(and" not in line for line in lines[1:11])
    assert lines[11] == f"  and {16 - shown} more errors."
    assert len(lines) <= 14


def test_messages_stay_short_and_on_one_line(write_data: WriteData) -> None:
    evil = "\n".join(["x" * 3000] * 3)
    bad: list[Any] = [
        {evil: 1},
        {"messages": [{"role": evil, "content": "a"}]},
        {"messages": [{"role": "user", "content": [evil]}]},
        b'{"messages": [], "' + b"k" * 3000 + b'": 1, "' + b"k" * 3000 + b'": 2}',
        {"messages": [{"role": "user", "content": "a"}] * 5000},
    ]
    errors = report_on(write_data(train=[*GOOD, *bad], valid=HELD_OUT)).errors
    assert {finding.line for finding in errors} == {5, 6, 7, 8, 9}
    for finding in errors:
        assert len(finding.message) < 300
        assert "\n" not in finding.message


CHANGES: dict[str, dict[str, list[Any]]] = {
    "an answer": {"train": [chat("Where is A?", "In Bland."), *GOOD[1:]]},
    "a role": {"train": [{"messages": GOOD[0]["messages"][::-1]}, *GOOD[1:]]},
    "the order": {"train": GOOD[::-1]},
    "tools": {"train": [chat("Where is A?", "In Aland.", tools=[{"name": "f"}]), *GOOD[1:]]},
    "a row less": {"train": GOOD[:3]},
    "valid": {"valid": [chat("Where is Z?", "In Xland.")]},
    "one more file": {"test": [chat("Where is Y?", "In Yland.")]},
    "a line end in a text": {"train": [chat("Where is A?\n", "In Aland."), *GOOD[1:]]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_depends_on_all_that_is_trained_on(name: str, write_data: WriteData) -> None:
    before = report_on(write_data(train=GOOD, valid=HELD_OUT)).digest
    assert report_on(write_data(**CHANGES[name])).digest != before


def test_the_digest_does_not_depend_on_how_the_json_is_written(write_data: WriteData) -> None:
    before = report_on(write_data(train=GOOD, valid=HELD_OUT)).digest
    spaced = [json.dumps(row | {"id": 1}, indent=None, separators=(" , ", " : ")) for row in GOOD]
    lines = [
        b"\xef\xbb\xbf" + spaced[0].encode(),
        b"",
        *(row.encode() + b"\r" for row in spaced[1:]),
    ]
    after = report_on(write_data(train=lines, valid=HELD_OUT))
    assert after.splits["train"].rows == 4
    assert after.digest == before


def test_naming_the_package_loads_no_pandera_no_polars_and_no_mlx() -> None:
    script = (
        "import sys; before = set(sys.modules); import nested_core.data; "
        "import nested_core.records.dataset, nested_core.data.lines.line_rows; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} "
        "& {'pandera', 'polars', 'mlx_lm', 'transformers'}))"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("A.", "a"), ("A.", "b")], PromptFormat(system="A.")),
        ([("A.", "a"), ("B.", "b")], PromptFormat()),
        ([("A.", "a"), (None, "b")], PromptFormat()),
        ([(None, "a"), (None, "b")], PromptFormat()),
    ],
)
def test_the_report_has_the_system_text_that_all_rows_of_train_share(
    tmp_path: Path, rows: Any, expected: PromptFormat
) -> None:
    lines = []
    for system, question in rows:
        first = [] if system is None else [{"role": "system", "content": system}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
        lines.append({"messages": [*first, *turns]})
    write_lines(tmp_path / "train.jsonl", lines)
    assert load(tmp_path, TokenizerSource(str(MODEL)))[0].prompt_format == expected


def test_rows_of_plain_text_have_prompts_that_are_asked_as_they_stand(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [{"text": "In Fiji, go and see Suva!"}])
    assert load(tmp_path, TokenizerSource(str(MODEL)))[0].prompt_format == PromptFormat(
        is_chat=False
    )
